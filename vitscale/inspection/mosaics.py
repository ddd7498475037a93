"""Filters, positions and attended images as pixels, without a plotting library."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

GAP = 1  # pixels between the tiles of positions


def position_mosaic(similarity: Float[Tensor, "h w h w"]) -> UInt8[Tensor, "y x 3"]:
    """Tiles in rows and columns, in grey, with gaps of the middle grey between them."""
    grey = tiled(similarity)
    return (127.5 + 127.5 * grey).round().clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, 3)


def tiled(similarity: Float[Tensor, "h w h w"], gap: float = 0.0) -> Float[Tensor, "y x"]:
    """Tiles in rows and columns, with a line of the value `gap` below and right of each."""
    rows, cols = similarity.shape[:2]
    tiles = F.pad(similarity, (0, GAP, 0, GAP), value=gap)  # [h, w, h + 1, w + 1]
    return tiles.permute(0, 2, 1, 3).reshape(rows * (rows + GAP), cols * (cols + GAP))


def filter_tiles(filters: Float[Tensor, "K P P 3"]) -> UInt8[Tensor, "K P P 3"]:
    """Filters around the middle grey, each scaled to its largest value."""
    scale = filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (127.5 + 127.5 * filters / scale).round().to(torch.uint8)


def enlarged(pixels: UInt8[Tensor, "*K h w 3"], side: int) -> UInt8[Tensor, "*K H W 3"]:
    """Each pixel as a square, as large as `side` allows for the longest side."""
    factor = max(1, side // max(pixels.shape[-3:-1]))
    return pixels.repeat_interleave(factor, dim=-3).repeat_interleave(factor, dim=-2)


def lit(images: UInt8[Tensor, "B 3 H W"], maps: Float[Tensor, "B h w"]) -> UInt8[Tensor, "B 3 H W"]:
    """The images times maps of any scale: the largest value of a map leaves its pixels."""
    masks = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)  # [B 1 H W]
    masks = masks / masks.amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (images * masks).to(torch.uint8)
