"""FLOPs of a model by formula, in the convention of the paper's Table 6.

A multiply-add is 2 FLOPs. Matmuls and convolutions count, attention's among them; norms,
softmax, activations and the head do not.
"""

import math
from collections.abc import Sequence

from vitscale.image_size import ImageSize, sides
from vitscale.models import ModelConfig
from vitscale.models.hybrid import HybridConfig
from vitscale.models.resnet import ROOT_KERNEL, BlockShape, ResNetConfig, halved
from vitscale.models.vit_config import ViTConfig


def forward_macs(config: ModelConfig) -> int:
    """Multiply-adds of one image, from the first layer to the final norm."""
    match config:
        case HybridConfig():
            stem = _resnet_macs(config.resolved_stem_width, config.block_shapes, config.image_size)
            return stem + _vit_macs(config)
        case ViTConfig():
            return _vit_macs(config)
        case ResNetConfig():
            return _resnet_macs(config.resolved_width, config.block_shapes, config.image_size)


def _vit_macs(config: ViTConfig) -> int:
    """For n patches of X values, N tokens of width D and an MLP of width M:

    patch embedding    n * X * D              X = 3 P^2 for P x P pixels
    each block         N * (4 D^2 + 2 D M)    qkv, output projection, MLP
                       + 2 N * A * D          attention scores, sum of the values
                       + n * (2 n - 1) * D    logits of relative positions, if any

    A, the tokens that each one attends to, is N; with axial attention it is a row's patches and
    a column's by turns, and 2 A is their sum.
    """
    width, tokens, grid = config.resolved_width, config.num_tokens, config.grid
    patches = math.prod(grid)
    twice_attended = sum(grid) if config.attention == "axial" else 2 * tokens
    block = tokens * (4 * width**2 + 2 * width * config.resolved_mlp_dim + twice_attended * width)
    if config.posemb == "relative":
        block += patches * (2 * patches - 1) * width
    return patches * config.patch_inputs * width + config.resolved_depth * block


def _resnet_macs(width: int, shapes: Sequence[BlockShape], image_size: ImageSize) -> int:
    """For I channels into a block, M in it and O out of it, and maps of s^2 and t^2 places:

    root convolution    t^2 * 49 * 3 * W    W is `width`
    each block          s^2 * I M + t^2 * (9 M^2 + M O)
    its projection      t^2 * I O
    """
    macs = math.prod(halved(sides(image_size))) * ROOT_KERNEL**2 * 3 * width
    for shape in shapes:
        places_out = math.prod(shape.grid_out)
        macs += math.prod(shape.grid_in) * shape.inputs * shape.mid
        macs += places_out * (9 * shape.mid**2 + shape.mid * shape.outputs)
        if shape.has_projection:
            macs += places_out * shape.inputs * shape.outputs
    return macs


def forward_flops(config: ModelConfig) -> int:
    """Forward FLOPs per image, without the head."""
    return 2 * forward_macs(config)


def train_flops(config: ModelConfig) -> int:
    """Forward and backward FLOPs per image, 3 x forward: MFU counts no recomputation."""
    return 3 * forward_flops(config)
