"""Models of the ViT's followers as plain ViTs with the same outputs.

    layer scales                multiply the projection before them (CaiT, DeiT III, DINOv2)
    positions of patches alone  a class token without a position has position 0 (DeiT III)
    positions of registers      belong to the registers
    a mask token                is of training alone (DINOv2)

Each value that changes is one product or one sum, rounded once to fp32.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.weights.foreign.config_json import parsed_size, patches_of, stated_size
from vitscale.weights.foreign.sources import ForeignWeights

# A layer scale, and the layer beside it whose outputs it multiplies.
_LAYER_SCALES = {
    r"(blocks\.\d+\.)ls1\.gamma": "attn.proj",
    r"(blocks\.\d+\.)ls2\.gamma": "mlp.fc2",
    r"(vit\.encoder\.layer\.\d+\.)layer_scale1\.lambda1": "attention.output.dense",
    r"(vit\.encoder\.layer\.\d+\.)layer_scale2\.lambda1": "output.dense",
}
_MASK_TOKENS = ("mask_token", "vit.embeddings.mask_token")
_REGISTERS, _KERNEL = "reg_token", "patch_embed.proj.weight"  # timm's


def fold(weights: ForeignWeights) -> ForeignWeights:
    """The same model, as far as it can be said, without what a plain ViT does not have.

    Models of Google and of ours have none of it. Raises CheckpointError for layer scales that
    do not fit their layers.
    """
    if weights.dialect not in ("timm", "transformers"):
        return weights
    return _fold_positions(_fold_layer_scales(_without_mask_token(weights)))


def _without_mask_token(weights: ForeignWeights) -> ForeignWeights:
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in _MASK_TOKENS}
    return dataclasses.replace(weights, shapes=shapes)


def _fold_layer_scales(weights: ForeignWeights) -> ForeignWeights:
    scale_of: dict[str, str] = {}  # by the tensors that they multiply
    for name in weights.shapes:
        for pattern, layer in _LAYER_SCALES.items():
            if match := re.fullmatch(pattern, name):
                scale_of |= {f"{match[1]}{layer}.{leaf}": name for leaf in ("weight", "bias")}
    for scaled, scale in scale_of.items():
        shape = weights.shapes.get(scaled)
        if shape is None or weights.shapes[scale] != shape[:1]:
            raise CheckpointError(
                f"{scale} is {weights.shapes[scale]}, which does not fit {scaled} of {shape or 'no shape'}"
            )

    def tensor(name: str) -> Tensor:
        value = weights.tensor(name)
        if name not in scale_of:
            return value
        scale = weights.tensor(scale_of[name])  # [D], for a weight [D, I] or a bias [D]
        return value * scale.reshape(-1, *[1] * (value.ndim - 1))

    scales = set(scale_of.values())
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in scales}
    return dataclasses.replace(weights, shapes=shapes, tensor=tensor)


def _fold_positions(weights: ForeignWeights) -> ForeignWeights:
    """Give timm's class token a position, 0, and add the positions of its registers to them."""
    shapes = dict(weights.shapes)
    posemb, registers = shapes.get("pos_embed", ()), shapes.get(_REGISTERS, (1, 0))[1]
    if weights.dialect != "timm" or "cls_token" not in shapes or len(posemb) != 3:
        return weights
    count = posemb[1]
    has_grid = _stated_grid(weights) or _is_square
    of_patches = has_grid(count)  # alone
    extra = 0 if of_patches or has_grid(count - 1) else registers
    shapes["pos_embed"] = (1, count + of_patches - extra, posemb[2])

    def tensor(name: str) -> Tensor:
        value = weights.tensor(name)
        if name == "pos_embed":
            token = torch.zeros_like(value[:, :1]) if of_patches else value[:, :1]
            return torch.cat([token, value if of_patches else value[:, 1 + extra :]], dim=1)
        if name == _REGISTERS and extra:
            return value + weights.tensor("pos_embed")[:, 1 : 1 + extra]
        return value

    return dataclasses.replace(weights, shapes=shapes, tensor=tensor)


def _stated_grid(weights: ForeignWeights) -> Callable[[int], bool] | None:
    """Whether so many patches are those of the images that config.json states, no squares."""
    stated, kernel = stated_size("timm", weights.config_json), weights.shapes.get(_KERNEL, ())
    size = parsed_size(stated[1]) if stated else None
    if not isinstance(size, tuple) or len(kernel) != 4:
        return None
    patches = patches_of(size, kernel[-1])
    return lambda count: 0 < count == patches


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
