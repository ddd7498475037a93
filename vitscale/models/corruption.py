"""Corrupted patch embeddings, for masked patch prediction (paper, appendix B.1.2).

The draws belong to a place in the global batch of a step, so they are the same on any number of
ranks.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vitscale import rng


class Corruption(NamedTuple):
    """Which patches of each image are corrupted, and how.

    corrupted: these patches, rising. sources: the patch whose embedding each patch gets; n, the
    number of patches, stands for the mask token. With n = 4,

        corrupted  [1, 2, 3]
        sources    [0, 4, 2, 0]    1 is masked, 2 stays as it is, 3 gets the embedding of 0
    """

    corrupted: Int64[Tensor, "B k"]
    sources: Int64[Tensor, "B n"]


def draw_corruption(
    num_patches: int,
    num_corrupted: int,
    *,
    masked: float,
    replaced: float,
    seed: int,
    step: int,
    first_position: int,
    count: int,
) -> Corruption:
    """How `count` images from a place on are corrupted, each in equally many patches.

    masked, replaced: the probabilities that a corrupted patch gets the mask token, and the
    embedding of another patch. The paper does not say of which image; here it is the same one,
    and each of its other patches is as likely, so that an image depends on no other.
    """
    width = 3 * num_patches
    drawn = rng.uniform_part(first_position * width, count * width, seed, "corrupt", step)
    ranks, kinds, others = drawn.reshape(count, 3, num_patches).swapaxes(0, 1)  # [B, n] each
    corrupted = np.sort(np.argsort(ranks, axis=1, kind="stable")[:, :num_corrupted], axis=1)  # [B, k]
    own = np.broadcast_to(np.arange(num_patches), ranks.shape)  # [B, n]
    other = (own + 1 + (others * (num_patches - 1)).astype(np.int64)) % num_patches
    given = np.where(kinds < masked, num_patches, np.where(kinds < masked + replaced, other, own))
    sources = own.copy()
    np.put_along_axis(sources, corrupted, np.take_along_axis(given, corrupted, axis=1), axis=1)
    return Corruption(torch.from_numpy(corrupted), torch.from_numpy(sources))
