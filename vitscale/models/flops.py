"""FLOPs by formula: 2 per multiply-add, attention matmuls included, nothing else (the convention of the
paper's Table 6).
"""

from vitscale.models.vit import ModelConfig


def forward_macs(config: ModelConfig) -> int:
    """Multiply-adds of one image up to the final norm: patch embedding, and per block projections, MLP and
    attention.
    """
    width, tokens = config.resolved_width, config.num_tokens
    patches, patch = config.grid[0] * config.grid[1], config.resolved_patch_size
    block = tokens * (4 * width**2 + 2 * width * config.resolved_mlp_dim) + 2 * tokens**2 * width
    return patches * 3 * patch**2 * width + config.resolved_depth * block


def head_macs(config: ModelConfig) -> int:
    """Multiply-adds of one image in pooling, tanh layer and classifier."""
    width, tokens = config.resolved_width, config.num_tokens
    pool = 2 * width**2 + tokens * (2 * width**2 + 2 * width) + 2 * width * config.resolved_mlp_dim
    hidden = config.representation_size or width
    return (
        (pool if config.pool == "map" else 0)
        + width * config.representation_size
        + hidden * config.num_classes
    )


def forward_flops(config: ModelConfig) -> int:
    """Forward FLOPs per image, without the head."""
    return 2 * forward_macs(config)


def train_flops(config: ModelConfig) -> int:
    """Forward and backward FLOPs per image, without recomputation and head: 3 x forward, as MFU counts."""
    return 3 * forward_flops(config)
