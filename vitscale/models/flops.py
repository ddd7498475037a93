"""FLOPs of a ViT by formula, in the convention of the paper's Table 6.

A multiply-add is 2 FLOPs. Matmuls count, attention's among them; norms, softmax, GELU and
the head do not.
"""

from vitscale.models.vit import ViTConfig


def forward_macs(config: ViTConfig) -> int:
    """Multiply-adds of one image, from the patch embedding to the final norm.

    For n patches of P x P pixels, N tokens of width D and an MLP of width M:

        patch embedding    n * 3 P^2 * D
        each block         N * (4 D^2 + 2 D M)    qkv, output projection, MLP
                           + 2 N^2 * D            attention scores, sum of the values
    """
    width, tokens = config.resolved_width, config.num_tokens
    patches, patch = config.grid[0] * config.grid[1], config.resolved_patch_size
    block = tokens * (4 * width**2 + 2 * width * config.resolved_mlp_dim) + 2 * tokens**2 * width
    return patches * 3 * patch**2 * width + config.resolved_depth * block


def forward_flops(config: ViTConfig) -> int:
    """Forward FLOPs per image, without the head."""
    return 2 * forward_macs(config)


def train_flops(config: ViTConfig) -> int:
    """Forward and backward FLOPs per image, 3 x forward: MFU counts no recomputation."""
    return 3 * forward_flops(config)
