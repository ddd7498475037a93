"""Stochastic depth (Huang et al. 2016): in training, blocks leave out their branches at random.

For each image, a block of rate r adds its attention, and its MLP, with probability 1 - r, times
1 / (1 - r). The draws belong to a place in the global batch of a step, so they are the same on
any number of ranks.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitscale import rng


def draw_kept(
    rate: float, depth: int, *, seed: int, step: int, first_position: int, count: int
) -> Float[Tensor, "L 2 B 1 1"]:
    """What the branches of each block are multiplied by, for `count` images from a place on.

    rate: of the last block; it rises evenly from 0 in the first one.
    """
    rates = np.linspace(0.0, rate, depth)[:, None]  # [L, 1], for the block's two branches
    width = 2 * depth
    drawn = rng.uniform_part(first_position * width, count * width, seed, "drop_path", step)
    kept = (drawn.reshape(count, depth, 2) >= rates) / (1.0 - rates)  # [B, L, 2]
    return torch.from_numpy(kept.astype(np.float32)).permute(1, 2, 0)[..., None, None].contiguous()
