"""Evaluation data: labelled samples by number. Nothing is augmented, and nothing replaced."""

import functools
import logging
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index
from vitscale.data.indexing import open_index
from vitscale.data.loader import pad_labels
from vitscale.data.reader import describe, read_any, read_samples
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import Source
from vitscale.data.transforms import evaluation_view
from vitscale.errors import DataError

logger = logging.getLogger(__name__)
Crop = Literal["resize", "center"]


class EvaluationSet(Dataset[tuple[Tensor, Tensor]]):
    """Samples 0 to num_samples - 1 of a data set, as model input of one size.

    These are all samples of `index`, or the validation split of `source`, which is cut from the
    data of a run. As training tolerates damage there, so does an evaluation: a sample of the
    split that cannot be used gets no labels, so that it does not count, and a warning names it.
    """

    def __init__(
        self,
        index: Index,
        *,
        image_size: int,
        crop: Crop = "resize",
        num_workers: int = 0,
        source: Source | None = None,
    ) -> None:
        self.index, self.image_size, self.num_workers = index, image_size, num_workers
        self.crop: Crop = crop
        self._ids = source.held_out if source else np.arange(index.num_samples)  # [num_samples]
        self._is_split = source is not None
        self._label_map = source.label_map if source else {}
        self._named = set[int]()  # damaged samples that a warning has named

    @classmethod
    def open(
        cls, pattern: str, *, image_size: int, crop: Crop = "resize", num_workers: int = 0
    ) -> "EvaluationSet":
        """Open an index.json, or plain shards by glob, brace pattern or URL (open_index)."""
        return cls(open_index(pattern), image_size=image_size, crop=crop, num_workers=num_workers)

    @property
    def num_samples(self) -> int:
        return len(self._ids)

    @functools.cached_property
    def labels(self) -> Int64[np.ndarray, "n M"]:
        """Labels of all samples, padded with -1: one pass over the shards, nothing decoded."""
        rows = [sample.labels for sample in read_samples(self.index, self._ids.tolist())]
        return pad_labels(rows, self.index.max_labels).numpy()

    def batches(
        self, indices: Int64[np.ndarray, " n"], batch_size: int
    ) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, "B M"]]]:
        """Batches of images and labels of `indices`, in that order.

        Raises DataError at a damaged sample, unless it is of a validation split.
        """
        parts = [indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)]
        workers = min(self.num_workers, len(parts))
        yield from DataLoader(self, batch_size=None, sampler=parts, num_workers=workers)

    def __getitem__(self, indices: list[int]) -> tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, "B M"]]:
        """Images and labels of several samples, in the order of `indices`."""
        views, rows, ids = [], [], self._ids[indices].tolist()
        for sample_id, sample in zip(ids, read_any(self.index, ids), strict=True):
            try:
                view, labels = self._usable(sample)
            except DamagedImage as error:
                self._leave_out(sample_id, f"sample {sample.key}: {error}")
                view, labels = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), ()
            views.append(view)
            rows.append(labels)
        return torch.stack(views), pad_labels(rows, self.index.max_labels)

    def _usable(self, sample: RawSample | BadSample) -> tuple[UInt8[Tensor, "3 S S"], tuple[int, ...]]:
        """The input and the labels of a sample. Raises DamagedImage if it cannot be used."""
        if isinstance(sample, BadSample):
            raise DamagedImage(sample.why())
        unknown = [label for label in sample.labels if self._label_map and label not in self._label_map]
        if unknown:
            raise DamagedImage(f"label {unknown[0]} is not in the label map")
        labels = tuple(self._label_map.get(label, label) for label in sample.labels)
        return evaluation_view(decode(sample.image), self.crop, self.image_size), labels

    def _leave_out(self, sample_id: int, problem: str) -> None:
        sentence = f"{describe(self.index, sample_id)}: {problem}"
        if not self._is_split:
            raise DataError(sentence)
        if sample_id not in self._named:
            logger.warning("left out of the validation: %s", sentence)
        self._named.add(sample_id)
