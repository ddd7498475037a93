"""What a run needs, by arithmetic, before anything is built."""

from vitscale.models.vit import ModelConfig


def state_bytes(num_params: int, zero_stage: int, world_size: int, precision: str) -> int:
    """Bytes per device of parameters, gradients and AdamW state (ZeRO paper, arXiv 1910.02054, section 3).

    fp32: 4 bytes each of parameters, gradients, two moments (and the master copy that ZeRO keeps). 16 bit: 2
    bytes of parameters and gradients, 12 of master and moments.
    """
    param, grad = (4, 4) if precision == "fp32" else (2, 2)
    optimizer = 12
    shared = {1: (param + grad, optimizer), 2: (param, grad + optimizer), 3: (0, param + grad + optimizer)}
    whole, sharded = shared[zero_stage]
    return num_params * whole + num_params * sharded // world_size


def activation_bytes(config: ModelConfig, micro_batch: int, precision: str, checkpointing: str) -> int:
    """Bytes of activations that the backward pass of one micro batch needs.

    Per token and layer in 16 bit: 16 D + 4 M (two norms, qkv, attention output, both MLP activations),
    without attention matrices; with full checkpointing 2 D, and one layer in full.
    """
    tokens = config.num_tokens
    full = tokens * (16 * config.resolved_width + 4 * config.resolved_mlp_dim)
    kept = tokens * 2 * config.resolved_width
    layers = config.resolved_depth
    per_image = layers * kept + full if checkpointing == "full" else layers * full
    return micro_batch * per_image * (2 if precision == "fp32" else 1)
