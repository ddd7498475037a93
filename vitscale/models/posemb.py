"""Position embeddings: the fixed 2-D sine-cosine table, and resizing of learned ones."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def resize_posemb(posemb: Float[Tensor, "1 N D"], old: Grid, new: Grid) -> Float[Tensor, "1 M D"]:
    """Resize the grid of a position embedding; the tokens before it keep theirs.

    old, new: (rows, columns), square or not. Bilinear with aligned corners equals the
    scipy.ndimage.zoom(order=1) of Google's code (checkpoint.py:interpolate_posembed);
    align_corners=False would not.
    """
    prefix = posemb.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise ValueError(
            f"{posemb.shape[1]} position embeddings are too few for a grid of {old[0]} x {old[1]}"
        )
    if old == new:
        return posemb
    grid = posemb[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([posemb[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


def sincos2d(grid: Grid, width: int, temperature: float = 10_000.0) -> Float[Tensor, "1 N D"]:
    """The fixed 2-D table of "Better plain ViT baselines" (big_vision posemb_sincos_2d)."""
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    omega = 1.0 / temperature ** (torch.arange(width // 4) / (width // 4 - 1))
    y, x = rows.reshape(-1, 1) * omega, cols.reshape(-1, 1) * omega  # [N, D / 4]
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]
