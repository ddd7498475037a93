"""Evaluation data: labelled samples by number. Nothing is augmented, and nothing replaced."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import xxhash
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from vitscale import distributed
from vitscale.data.classes import mapped_classes
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index
from vitscale.data.indexing import open_index
from vitscale.data.loader import pad_labels
from vitscale.data.reader import describe, read_any, read_samples
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import Source, label_problem, named, read_label_map
from vitscale.data.transforms import Crop, evaluation_view
from vitscale.data.workers import made_by_workers
from vitscale.errors import DataError, UserError
from vitscale.image_size import ImageSize, sides

logger = logging.getLogger(__name__)
PREFETCHED_BATCHES = 2  # that each data worker holds ready


class EvaluationSet:
    """Samples 0 to num_samples - 1 of a data set, as model input of one size.

    These are all samples of `index`, with labels mapped by `label_map` (None = as they are), or
    the validation split of `source`, which is cut from the data of a run. As training tolerates
    damage there, so does an evaluation: a sample of the split that cannot be used gets no
    labels, so that it does not count, and a warning names it (report_left_out).
    """

    def __init__(
        self,
        index: Index,
        *,
        image_size: ImageSize,
        crop: Crop = "resize",
        num_workers: int = 0,
        source: Source | None = None,
        label_map: Mapping[int, int] | None = None,
    ) -> None:
        self.index, self.num_workers = index, num_workers
        self._ids = source.held_out if source else np.arange(index.num_samples)  # [num_samples]
        label_map = source.label_map if source else label_map or {}
        self._views = _Views(index, self._ids, image_size, crop, label_map)
        self._source = source
        self._left_out: dict[int, str] = {}  # by sample: why it cannot be used, not yet reported
        self._reported = set[int]()

    @classmethod
    def open(
        cls,
        pattern: str,
        *,
        image_size: ImageSize,
        crop: Crop = "resize",
        num_workers: int = 0,
        label_map: str = "",
    ) -> "EvaluationSet":
        """Open an index.json, or plain shards by glob, brace pattern or URL (open_index).

        label_map: a file, as of data.label_map; "" = none.
        """
        index = open_index(pattern)
        mapping = read_label_map(label_map, index) if label_map else {}
        return cls(index, image_size=image_size, crop=crop, num_workers=num_workers, label_map=mapping)

    @property
    def num_samples(self) -> int:
        return len(self._ids)

    def named(self, label: int) -> str:
        """A label of the model for messages, with the name of its class."""
        return named(label, self.index, self._views.label_map)

    @property
    def classes(self) -> dict[str, int]:
        """The model's labels of the class names; {} if the names are not known."""
        return mapped_classes(self.index.classes, self._views.label_map)

    @property
    def max_label(self) -> int:
        """The highest label of the model that a sample has."""
        return max(self._views.label_map.get(label, label) for label in self.index.label_counts)

    def fingerprint(self) -> str:
        """Names what the samples are and how they become input."""
        views = self._views
        parts = [self.index.fingerprint(), views.crop, views.image_size, sorted(views.label_map.items())]
        digest = xxhash.xxh3_128(repr(parts).encode())
        digest.update(np.ascontiguousarray(self._ids).tobytes())
        return digest.hexdigest()

    def labels(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "n M"]:
        """Labels of `indices`, padded with -1: their chunks are read, nothing is decoded."""
        samples = read_samples(self.index, self._ids[indices].tolist())
        rows = [self._views.mapped(sample.labels) for sample in samples]
        return pad_labels(rows, self.index.max_labels).numpy()

    def keys(self) -> Iterator[str]:
        """The keys of all samples: one pass over the shards, nothing decoded."""
        return (sample.key for sample in read_any(self.index, self._ids.tolist()))

    def batches(
        self, indices: Int64[np.ndarray, " n"], batch_size: int, *, num_classes: int = 0
    ) -> Iterator[tuple[UInt8[Tensor, "B 3 H W"], Int64[Tensor, "B M"]]]:
        """Batches of images and labels of `indices`, in that order.

        num_classes: of the model; a sample with a higher label cannot be used. 0 = any label.
        Raises DataError at a sample that cannot be used, unless it is of a validation split,
        StoreError if a store does not answer, and ConfigError as check_sockets does.
        """
        parts = [indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)]
        made = made_by_workers(
            dataclasses.replace(self._views, num_classes=num_classes),
            len(parts),
            min(self.num_workers, len(parts)),
            prefetched=PREFETCHED_BATCHES,
            sampler=parts,
            pin_memory=distributed.device().type == "cuda",
        )
        with contextlib.closing(made):
            for images, labels, problems in made:
                if problems and not self._source:
                    raise DataError(next(iter(problems.values())))
                self._left_out |= problems
                yield images, labels

    def report_left_out(self) -> None:
        """Warn, on rank 0, of the samples that any rank left out; every rank calls it."""
        gathered = distributed.gather_json_to_main(list(self._left_out.items()))
        self._left_out = {}
        found = dict(pair for pairs in gathered for pair in pairs)
        for sample_id in sorted(found.keys() - self._reported):
            logger.warning("left out of the validation: %s", found[sample_id])
        self._reported |= found.keys()


@dataclasses.dataclass(frozen=True)
class _Views(Dataset[tuple[Tensor, Tensor, dict[int, str]] | UserError]):
    """What a data worker needs to make batches. label_map: empty = labels stay as they are."""

    index: Index
    ids: Int64[np.ndarray, " n"]
    image_size: ImageSize
    crop: Crop
    label_map: Mapping[int, int]
    num_classes: int = 0

    def __getitem__(
        self, indices: list[int]
    ) -> tuple[UInt8[Tensor, "B 3 H W"], Int64[Tensor, "B M"], dict[int, str]] | UserError:
        """Images and labels of several samples, in the order of `indices`.

        The last item says by sample id which of them cannot be used, and why. These are black,
        and without labels. A UserError is returned: DataLoader would wrap what is raised in its
        own message.
        """
        try:
            return self._batch(self.ids[indices].tolist())
        except UserError as error:
            return error

    def _batch(self, ids: list[int]) -> tuple[UInt8[Tensor, "B 3 H W"], Int64[Tensor, "B M"], dict[int, str]]:
        views, rows, problems = [], [], dict[int, str]()
        for sample_id, sample in zip(ids, read_any(self.index, ids), strict=True):
            try:
                view, labels = self._usable(sample)
            except DamagedImage as error:
                problems[sample_id] = f"{describe(self.index, sample_id)}: sample {sample.key}: {error}"
                view, labels = torch.zeros(3, *sides(self.image_size), dtype=torch.uint8), ()
            views.append(view)
            rows.append(labels)
        return torch.stack(views), pad_labels(rows, self.index.max_labels), problems

    def _usable(self, sample: RawSample | BadSample) -> tuple[UInt8[Tensor, "3 H W"], tuple[int, ...]]:
        """The input and the labels of a sample. Raises DamagedImage if it cannot be used."""
        if isinstance(sample, BadSample):
            raise DamagedImage(sample.why())
        problem = label_problem(sample.labels, self.index, self.label_map, self.num_classes)
        if problem:
            raise DamagedImage(problem)
        view = evaluation_view(decode(sample.image), self.crop, self.image_size)
        return view, self.mapped(sample.labels)

    def mapped(self, labels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.label_map.get(label, label) for label in labels)
