"""Frozen features of a data set, computed by all ranks together."""

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitscale import distributed
from vitscale.data.evalset import EvaluationSet
from vitscale.errors import DataError, NotFinite
from vitscale.evals.task import EvalModel


def rank_block(num_samples: int, rank: int, world_size: int) -> tuple[range, int]:
    """The contiguous block of positions that a rank takes, and the length that all ranks run.

    Under ZeRO stage 3 a forward pass is a collective, so all ranks must run the model equally
    often. The blocks of the last ranks may be shorter, or empty; any sample fills them up:

        10 samples on 4 ranks: length 3, blocks 0-2, 3-5, 6-8, 9
         5 samples on 4 ranks: length 2, blocks 0-1, 2-3, 4, none
    """
    length = -(-num_samples // world_size)
    start = min(rank * length, num_samples)
    return range(start, min(start + length, num_samples)), length


def own_indices(indices: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " length"], int]:
    """This rank's share of `indices`, filled up to the common length, and how many count."""
    if len(indices) == 0:
        raise DataError("the evaluation set is empty; give shards that hold samples")
    block, length = rank_block(len(indices), distributed.rank(), distributed.world_size())
    own = indices[block.start : block.stop]
    return np.concatenate([own, np.full(length - len(own), indices[-1])]), len(own)


def extract(
    model: EvalModel, dataset: EvaluationSet, indices: Int64[np.ndarray, " n"], batch_size: int
) -> tuple[Float[Tensor, "n D"], Int64[Tensor, "n M"]]:
    """Features and labels of the samples `indices`, in that order, on every rank's CPU.

    Every rank calls it. What the model's store has is not computed again. batch_size: per rank.
    Labels are padded with -1. Raises NotFinite on all ranks if a feature of any image is not.
    """

    def compute() -> dict[str, Tensor]:
        own, count = own_indices(indices)
        rows, labels = [], []
        for images, batch_labels in dataset.batches(own, batch_size):
            rows.append(model.features(images).float().cpu())  # [B, D]
            labels.append(batch_labels)
        tables = {"features": torch.cat(rows), "labels": torch.cat(labels)}
        return {name: distributed.all_gather_rows(table[:count]) for name, table in tables.items()}

    chosen = xxhash.xxh3_64(np.ascontiguousarray(indices).tobytes()).hexdigest()
    found = model.stored.get(f"{dataset.fingerprint()}-{chosen}", compute)
    check_finite("features", int(finite_rows(found["features"]).sum()), len(indices))
    return found["features"], found["labels"]


def finite_rows(rows: Float[Tensor, "n D"]) -> Bool[Tensor, " n"]:
    """Which rows have no NaN and no infinity."""
    low, high = rows.aminmax(dim=1)  # NaN if a value is; no copy of what may be gigabytes
    return low.isfinite() & high.isfinite()


def check_finite(what: str, num_finite: int, num_images: int) -> None:
    """Raise NotFinite unless all images are finite; the numbers are those of all ranks."""
    if num_finite < num_images:
        raise NotFinite(
            f"the {what} of {num_images - num_finite:,} of {num_images:,} images are not finite", shared=True
        )
