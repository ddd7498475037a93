"""Evaluation data: labelled samples by number. Nothing is augmented, and nothing replaced."""

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index, open_index
from vitscale.data.loader import pad_labels
from vitscale.data.reader import describe, read_samples
from vitscale.data.transforms import evaluation_view
from vitscale.errors import DataError

Crop = Literal["resize", "center"]


class EvaluationSet(Dataset[tuple[Tensor, Tensor]]):
    """Samples 0 to num_samples - 1 of an index, as model input of one size."""

    def __init__(self, index: Index, *, image_size: int, crop: Crop = "resize", num_workers: int = 0) -> None:
        self.index, self.image_size, self.num_workers = index, image_size, num_workers
        self.crop: Crop = crop

    @classmethod
    def open(
        cls, pattern: str, *, image_size: int, crop: Crop = "resize", num_workers: int = 0
    ) -> "EvaluationSet":
        """Open an index.json, or plain shards by glob, brace pattern or URL (open_index)."""
        return cls(open_index(pattern), image_size=image_size, crop=crop, num_workers=num_workers)

    @property
    def num_samples(self) -> int:
        return self.index.num_samples

    @functools.cached_property
    def labels(self) -> Int64[np.ndarray, "n M"]:
        """Labels of all samples, padded with -1: one pass over the shards, nothing decoded."""
        rows = [sample.labels for sample in read_samples(self.index, range(self.num_samples))]
        return pad_labels(rows, self.index.max_labels).numpy()

    def batches(
        self, indices: Int64[np.ndarray, " n"], batch_size: int
    ) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, "B M"]]]:
        """Batches of images and labels of `indices`, in that order.

        Raises DataError at a damaged sample.
        """
        parts = [indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)]
        workers = min(self.num_workers, len(parts))
        yield from DataLoader(self, batch_size=None, sampler=parts, num_workers=workers)

    def __getitem__(self, ids: list[int]) -> tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, "B M"]]:
        """Images and labels of several samples, in the order of `ids`."""
        views, labels = [], []
        for sample_id, sample in zip(ids, read_samples(self.index, ids), strict=True):
            try:
                views.append(evaluation_view(decode(sample.image), self.crop, self.image_size))
            except DamagedImage as error:
                raise DataError(f"{describe(self.index, sample_id)}: sample {sample.key}: {error}") from None
            labels.append(sample.labels)
        return torch.stack(views), pad_labels(labels, self.index.max_labels)
