"""What a run needs of a device's memory, by arithmetic, before anything is built."""

from vitscale.engine.zero import OPTIMIZER_SLOTS
from vitscale.models import ModelConfig, empty_model
from vitscale.models.layers import Checkpointing
from vitscale.models.vit import ViTConfig
from vitscale.optim import OptimConfig, freeze


def state_bytes(num_params: int, zero_stage: int, world_size: int, precision: str) -> int:
    """Bytes per device of parameters, gradients and AdamW's state.

    From a stage on, ZeRO cuts them by the world size (arXiv 1910.02054, section 3):

        bytes per parameter    fp32    16 bit    cut from stage
        parameters                4         2    3
        gradients                 4         2    2    (and 4 in bf16 at stage 1, never cut)
        optimizer                12        12    1    (fp32 master, two moments)

    In bf16 at stage 1 DeepSpeed accumulates gradients in a buffer in fp32, whole on each device.
    """
    param, grad = (4, 4) if precision == "fp32" else (2, 2)
    if precision == "bf16" and zero_stage == 1:
        grad += 4
    optimizer = 12
    shared = {1: (param + grad, optimizer), 2: (param, grad + optimizer), 3: (0, param + grad + optimizer)}
    whole, sharded = shared[zero_stage]
    return num_params * whole + num_params * sharded // world_size


def activation_bytes(
    config: ViTConfig, micro_batch: int, precision: str, checkpointing: Checkpointing
) -> int:
    """Bytes of activations that the backward pass of one micro batch needs.

    Per token of a block of width D and MLP width M, in 16 bit; fp32 takes twice as much:

        "none"         two norms, qkv, attention output: 16 D; both activations of the MLP: 4 M
        "selective"    input, qkv, attention output, both projections: 12 D; first MLP layer: 2 M
        "full"         input: 2 D

    Attention matrices are never stored. What is recomputed needs the memory of "none" for one
    block at a time.
    """
    tokens, width, mlp = config.num_tokens, config.resolved_width, config.resolved_mlp_dim
    whole = tokens * (16 * width + 4 * mlp)
    kept = {"none": whole, "selective": tokens * (12 * width + 2 * mlp), "full": tokens * 2 * width}
    at_once = 0 if checkpointing == "none" else whole
    per_image = config.resolved_depth * kept[checkpointing] + at_once
    return micro_batch * per_image * (2 if precision == "fp32" else 1)


def checkpoint_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """Bytes of a checkpoint: fp32 weights and, of what is trained, the other slots."""
    model = empty_model(config)
    freeze(model, optim.freeze)
    slots = 1 + len(OPTIMIZER_SLOTS[optim.name]) + (optim.ema_decay > 0)
    return sum(4 * param.numel() * (slots if param.requires_grad else 1) for param in model.parameters())
