"""Position embeddings: tables of two axes, relative ones, and resizing of learned ones.

The paper compares them in its appendix D.4, Table 8.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscale.errors import ConfigError

Grid = tuple[int, int]
Posemb = Literal["learned", "sincos2d", "none", "learned2d", "relative"]
Placement = Literal["input", "every_layer", "shared"]


def check_posemb(posemb: Posemb, posemb_at: Placement, width: int) -> None:
    """Raise ConfigError for position embeddings that a model of this width cannot have."""
    if posemb == "sincos2d" and (width % 4 or width < 8):
        raise ConfigError(
            f'model.posemb "sincos2d" needs a width that is a multiple of 4 from 8 on, not {width}'
        )
    if posemb == "learned2d" and width % 2:
        raise ConfigError(f'model.posemb "learned2d" needs an even width, not {width}: each axis has half')
    if posemb_at != "input" and posemb not in ("learned", "learned2d"):
        raise ConfigError(
            f'model.posemb_at "{posemb_at}" is for "learned" and "learned2d", not for model.posemb '
            f'"{posemb}"; leave it out'
        )


def resize_posemb(posemb: Float[Tensor, "L N D"], old: Grid, new: Grid) -> Float[Tensor, "L M D"]:
    """Resize the grid of position embeddings; the tokens before it keep theirs.

    L: the layers that have one of their own, or 1. old, new: (rows, columns), square or not.
    Bilinear with aligned corners equals the scipy.ndimage.zoom(order=1) of Google's code
    (checkpoint.py:interpolate_posembed); align_corners=False would not.
    """
    prefix = posemb.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise ValueError(
            f"{posemb.shape[1]} position embeddings are too few for a grid of {old[0]} x {old[1]}"
        )
    if old == new:
        return posemb
    grid = posemb[:, prefix:].reshape(len(posemb), *old, -1).permute(0, 3, 1, 2)  # [L, D, h, w]
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([posemb[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


def resize_axis(posemb: Float[Tensor, "L n D"], new: int) -> Float[Tensor, "L m D"]:
    """Resize the position embeddings of one axis; its ends keep theirs.

    Joined by table2d, two axes resized so are the table that resize_posemb makes of the joined.
    """
    if posemb.shape[1] == new:
        return posemb
    return F.interpolate(posemb.transpose(1, 2), new, mode="linear", align_corners=True).transpose(1, 2)


def table2d(x: Float[Tensor, "L w E"], y: Float[Tensor, "L h E"]) -> Float[Tensor, "L N D"]:
    """The embedding of each patch, row by row: that of its column, then that of its row."""
    (layers, cols, half), rows = x.shape, y.shape[1]
    shape = (layers, rows, cols, half)
    joined = torch.cat([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)  # [L, h, w, D]
    return joined.flatten(1, 2)


def sincos2d(grid: Grid, width: int) -> Float[Tensor, "1 N D"]:
    """The fixed 2-D table of "Better plain ViT baselines" (big_vision posemb_sincos_2d)."""
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    omega = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4 - 1))
    y, x = rows.reshape(-1, 1) * omega, cols.reshape(-1, 1) * omega  # [N, D / 4]
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


class RelativeBias(nn.Module):
    """Relative position embeddings as keys, whose logits are added to those of attention (D.4).

    A pair of patches has the offset q - k of their places in raster order, from 1 - n to n - 1,
    and each offset an embedding, with which the query of patch q is multiplied. It is as wide
    as the keys of all heads: each head has its own part. Tokens before the patches, the class
    token and registers, have no place: pairs with one get 0. So the embeddings of the last
    layer stay without effect where the class token alone is read.

    Of patches in different rows, the same offset can be of different directions.
    """

    def __init__(self, num_patches: int, width: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.embed = nn.Parameter(torch.empty(2 * num_patches - 1, width))

    def forward(self, query: Float[Tensor, "B K N d"]) -> Float[Tensor, "B K N N"]:
        """Logits divided by the root of d, as scaled_dot_product_attention adds them."""
        _, heads, tokens, size = query.shape
        count = self.num_patches
        before = tokens - count
        # Of the largest offset first, so that keys come in their order.
        keys = self.embed.flip(0).unflatten(1, (heads, size)).permute(1, 2, 0)  # [K, d, 2 n - 1]
        logits = query[:, :, before:] @ (keys * size**-0.5)  # [B, K, n, 2 n - 1]
        # Row q has its n keys from column n - 1 - q on. With a column more, and then read as
        # rows of one column less, each row begins a place earlier than the one above:
        #
        #     n = 2: [[1, 0, -1], [1, 0, -1]]    offsets of the columns
        #         -> [1, 0, -1, _, 1, 0, -1, _]  flat, with a column more
        #         -> [0, -1, _, 1, 0, -1]        without the first n - 1, and without the rest
        #         -> [[0, -1], [1, 0]]           rows of 2 n - 1, of which the first n count
        flat = F.pad(logits, (0, 1)).flatten(2)  # [B, K, n 2 n]
        shifted = flat[:, :, count - 1 : count - 1 + count * (2 * count - 1)]
        bias = shifted.unflatten(2, (count, 2 * count - 1))[..., :count]  # [B, K, n, n]
        return F.pad(bias, (before, 0, before, 0)) if before else bias
