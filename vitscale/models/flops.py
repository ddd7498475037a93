"""FLOPs of a model by formula, in the convention of the paper's Table 6.

A multiply-add is 2 FLOPs. Matmuls and convolutions count, attention's among them; norms,
softmax, activations and the head do not.
"""

from vitscale.models import ModelConfig
from vitscale.models.resnet import ROOT_KERNEL, ResNetConfig, block_shapes, halved
from vitscale.models.vit import ViTConfig


def forward_macs(config: ModelConfig) -> int:
    """Multiply-adds of one image, from the first layer to the final norm."""
    match config:
        case ViTConfig():
            return _vit_macs(config)
        case ResNetConfig():
            return _resnet_macs(config)


def _vit_macs(config: ViTConfig) -> int:
    """For n patches of P x P pixels, N tokens of width D and an MLP of width M:

    patch embedding    n * 3 P^2 * D
    each block         N * (4 D^2 + 2 D M)    qkv, output projection, MLP
                       + 2 N^2 * D            attention scores, sum of the values
    """
    width, tokens = config.resolved_width, config.num_tokens
    patches, patch = config.grid[0] * config.grid[1], config.resolved_patch_size
    block = tokens * (4 * width**2 + 2 * width * config.resolved_mlp_dim) + 2 * tokens**2 * width
    return patches * 3 * patch**2 * width + config.resolved_depth * block


def _resnet_macs(config: ResNetConfig) -> int:
    """For I channels into a block, M in it and O out of it, and maps of s x s and t x t:

    root convolution    t^2 * 49 * 3 * W
    each block          s^2 * I M + t^2 * (9 M^2 + M O)
    its projection      t^2 * I O
    """
    macs = halved(config.image_size) ** 2 * ROOT_KERNEL**2 * 3 * config.resolved_width
    for shape in block_shapes(config):
        macs += shape.side_in**2 * shape.inputs * shape.mid
        macs += shape.side_out**2 * (9 * shape.mid**2 + shape.mid * shape.outputs)
        if shape.has_projection:
            macs += shape.side_out**2 * shape.inputs * shape.outputs
    return macs


def forward_flops(config: ModelConfig) -> int:
    """Forward FLOPs per image, without the head."""
    return 2 * forward_macs(config)


def train_flops(config: ModelConfig) -> int:
    """Forward and backward FLOPs per image, 3 x forward: MFU counts no recomputation."""
    return 3 * forward_flops(config)
