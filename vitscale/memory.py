"""What a run needs of a device's memory, by arithmetic, before anything is built."""

from vitscale.engine.zero import OPTIMIZER_SLOTS
from vitscale.models import ModelConfig, empty_model
from vitscale.models.vit import ViTConfig
from vitscale.optim import OptimConfig, freeze


def state_bytes(num_params: int, zero_stage: int, world_size: int, precision: str) -> int:
    """Bytes per device of parameters, gradients and AdamW's state.

    From a stage on, ZeRO cuts them by the world size (arXiv 1910.02054, section 3):

        bytes per parameter    fp32    16 bit    cut from stage
        parameters                4         2    3
        gradients                 4         2    2
        optimizer                12        12    1    (fp32 master, two moments)
    """
    param, grad = (4, 4) if precision == "fp32" else (2, 2)
    optimizer = 12
    shared = {1: (param + grad, optimizer), 2: (param, grad + optimizer), 3: (0, param + grad + optimizer)}
    whole, sharded = shared[zero_stage]
    return num_params * whole + num_params * sharded // world_size


def activation_bytes(config: ViTConfig, micro_batch: int, precision: str, checkpointing: str) -> int:
    """Bytes of activations that the backward pass of one micro batch needs.

    Per token of a block of width D and MLP width M, in 16 bit; fp32 takes twice as much:

        two norms, qkv, attention output     16 D
        both activations of the MLP           4 M

    Attention matrices are never stored. With full checkpointing only each block's input is
    kept, 2 D, and one block at a time in full.
    """
    tokens = config.num_tokens
    full = tokens * (16 * config.resolved_width + 4 * config.resolved_mlp_dim)
    kept = tokens * 2 * config.resolved_width
    layers = config.resolved_depth
    per_image = layers * kept + full if checkpointing == "full" else layers * full
    return micro_batch * per_image * (2 if precision == "fp32" else 1)


def checkpoint_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """Bytes of a checkpoint: fp32 weights and, of what is trained, the other slots."""
    model = empty_model(config)
    freeze(model, optim.freeze)
    slots = 1 + len(OPTIMIZER_SLOTS[optim.name]) + (optim.ema_decay > 0)
    return sum(4 * param.numel() * (slots if param.requires_grad else 1) for param in model.parameters())
