"""Frozen features of a data set, computed by all ranks together."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale import distributed
from vitscale.config import ConfigError
from vitscale.data.evalset import EvaluationSet


def rank_block(num_samples: int, rank: int, world_size: int) -> tuple[range, int]:
    """The contiguous block of positions that a rank takes, and its length, which is the same on every rank.

    The last ranks' blocks may be shorter than that length, or empty; they fill up with any sample, so that
    every rank runs the model equally often: under ZeRO stage 3 a forward pass is a collective.
    """
    length = -(-num_samples // world_size)
    start = min(rank * length, num_samples)
    return range(start, min(start + length, num_samples)), length


def own_indices(indices: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " length"], int]:
    """This rank's share of `indices`, filled up to the length all ranks have, and how many of it count."""
    if len(indices) == 0:
        raise ConfigError("the evaluation set is empty; give shards that hold samples")
    block, length = rank_block(len(indices), distributed.rank(), distributed.world_size())
    own = indices[block.start : block.stop]
    return np.concatenate([own, np.full(length - len(own), indices[-1])]), len(own)


def extract(
    features: Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B D"]],
    dataset: EvaluationSet,
    indices: Int64[np.ndarray, " n"],
    batch_size: int,
) -> tuple[Float[Tensor, "n D"], Int64[Tensor, "n M"]]:
    """Features and labels of the samples `indices`, in order, on every rank's CPU; every rank calls it.

    features: takes a batch on the CPU and moves it to its device itself. batch_size is per rank.
    """
    own, count = own_indices(indices)
    rows, labels = [], []
    for images, batch_labels in dataset.batches(own, batch_size):
        rows.append(features(images).float().cpu())  # [B, D]
        labels.append(batch_labels)
    gathered = distributed.all_gather_rows(torch.cat(rows)[:count])
    return gathered, distributed.all_gather_rows(torch.cat(labels)[:count])
