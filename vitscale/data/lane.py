"""One lane's training samples in order: read ahead by threads, decoded, augmented, and replaced where
damaged.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vitscale import rng
from vitscale.data.decode import DamagedImage, Decoder, decode
from vitscale.data.index import DataError
from vitscale.data.mix import Mixture
from vitscale.data.order import Order, Window
from vitscale.data.reader import Chunk, describe
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import Source
from vitscale.data.transforms import AugmentConfig, ViewKey, augment, choose_box, finish_view

MAX_REPLACEMENTS = 100
READ_AHEAD = 1 / 8  # of a window: when no more is left of it, the next one is read

ReadChunk = Callable[[int], Chunk]


class Recipe(NamedTuple):
    """What is made of a sample's bytes."""

    augment: AugmentConfig
    decoder: Decoder
    image_size: int
    num_classes: int


class View(NamedTuple):
    """A training view of a sample: its number through all sources, uint8 [3, S, S], its labels."""

    sample: int
    image: Tensor
    labels: tuple[int, ...]


class Lane:
    """A lane from its first draw of a step on."""

    def __init__(
        self,
        number: int,
        first_step: int,
        mixture: Mixture,
        sources: tuple[Source, ...],
        recipe: Recipe,
        readers: tuple[ReadChunk, ...],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._number, self._mixture, self._draw = number, mixture, first_step * mixture.draws_per_step
        feeds = []
        for order, source, read, given in zip(
            mixture.orders, sources, readers, mixture.counts(number, self._draw), strict=True
        ):
            feeds.append(_Feed(order, source, number, given, read, threads))
        self._feeds = feeds
        self._makers = [
            ViewMaker(source, first_id, read, recipe, mixture.seed)
            for source, first_id, read in zip(sources, mixture.first_ids, readers, strict=True)
        ]

    def take_step(self) -> list[View]:
        """The views of one step, in batch order."""
        views = []
        for _ in range(self._mixture.draws_per_step):
            source, _ = self._mixture.source_of(self._number, self._draw)
            self._draw += 1
            views.append(self._makers[source].make(*self._feeds[source].take()))
        return [sample[view] for view in range(self._mixture.repeats) for sample in views]

    def take_bad(self) -> list[str]:
        """The sentences about samples replaced since the last call."""
        bad = [sentence for maker in self._makers for sentence in maker.bad]
        for maker in self._makers:
            maker.bad.clear()
        return bad


class _Request(NamedTuple):
    """A window under way: the samples to hold for it and for the begin of the next one, and their reads."""

    window: Window
    wanted: set[int]
    reads: list[Future[dict[int, RawSample | BadSample]]]


class _Feed:
    """The undecoded samples of one source in one lane. A sample is held from its chunk's arrival to its
    turn.
    """

    def __init__(
        self,
        order: Order,
        source: Source,
        lane: int,
        first_draw: int,
        read: ReadChunk,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._layout, self._read, self._threads = source.index.layout, read, threads
        self._windows = order.lane_stream(lane, first_draw)
        self._ahead = int(READ_AHEAD * order.window_samples) + 1
        self._held: dict[int, RawSample | BadSample] = {}
        self._epoch, self._pending = 0, list[int]()
        self._next: _Request | None = None

    def take(self) -> tuple[int, int, RawSample | BadSample]:
        """The next draw: (epoch, sample id, sample)."""
        if not self._pending:
            self._advance()
        sample_id = self._pending.pop()
        if self._next is None and len(self._pending) <= self._ahead:
            self._next = self._request()
        return self._epoch, sample_id, self._held.pop(sample_id)

    def _request(self) -> _Request:
        window = next(self._windows)
        drawn = window.ids[window.skip :].tolist()
        # What is held of an earlier epoch will have been taken by then.
        held = self._held if window.epoch == self._epoch else {}
        missing = np.array([sample_id for sample_id in drawn if sample_id not in held], dtype=np.int64)
        # The chunk in which the window ends holds the first samples of the next one.
        end = self._layout.chunk_ids(int(self._layout.chunk_of(np.array([window.last]))[0])).stop
        wanted = {*drawn, *range(window.last + 1, end)}
        chunks = np.unique(self._layout.chunk_of(missing)).tolist()
        return _Request(window, wanted, [self._threads.submit(self._fetch, c, wanted) for c in chunks])

    def _fetch(self, chunk: int, wanted: set[int]) -> dict[int, RawSample | BadSample]:
        samples = zip(self._layout.chunk_ids(chunk), self._read(chunk), strict=True)
        return {sample_id: _detached(sample) for sample_id, sample in samples if sample_id in wanted}

    def _advance(self) -> None:
        window, wanted, reads = self._next or self._request()
        self._next = None
        self._epoch, self._pending = window.epoch, window.ids[window.skip :].tolist()[::-1]
        self._held = {sample_id: sample for sample_id, sample in self._held.items() if sample_id in wanted}
        for read in reads:
            self._held |= read.result()


def _detached(sample: RawSample | BadSample) -> RawSample | BadSample:
    """The sample with bytes of its own: a view would keep its whole chunk until the last of them is used."""
    if isinstance(sample, BadSample):
        return sample
    return sample._replace(image=bytes(sample.image))


class ViewMaker:
    """Samples of one source to views; one that cannot be used is replaced by a deterministic other one of
    the
    same source, which its sentence in `bad` tells, or is silently expected where it was excluded.
    """

    def __init__(self, source: Source, first_id: int, read: ReadChunk, recipe: Recipe, seed: int) -> None:
        self._source, self._first_id, self._read = source, first_id, read
        self._recipe, self._seed = recipe, seed
        self.bad: list[str] = []

    def make(self, epoch: int, sample_id: int, sample: RawSample | BadSample) -> list[View]:
        """The `repeats` views of a sample in an epoch, or of its replacement. Raises DataError when 100
        samples in a row cannot be used.
        """
        drawn, reason = sample_id, ""
        for attempt in range(MAX_REPLACEMENTS):
            if not self._is_excluded(sample_id):
                reason = self._unusable(sample)
                if isinstance(sample, RawSample) and not reason:
                    try:
                        return self._views(sample, epoch, sample_id)
                    except DamagedImage as error:
                        reason = str(error)
                self.bad.append(f"{describe(self._source.index, sample_id)}: sample {sample.key}: {reason}")
            draw = rng.uniform(1, self._seed, "replace", self._first_id + drawn, attempt)[0]
            sample_id = int(draw * self._source.index.num_samples)
            sample = self._sample(sample_id)
        raise DataError(
            f"{MAX_REPLACEMENTS} samples in a row could not be used, the last for: {reason or 'exclusion'}; "
            "see what is left with: python tools/data.py verify INDEX"
        )

    def _views(self, sample: RawSample, epoch: int, sample_id: int) -> list[View]:
        config, decoder, size, _ = self._recipe
        number = self._first_id + sample_id
        keys = [ViewKey(self._seed, epoch, number, view) for view in range(config.repeats)]
        if len(keys) == 1:
            box = functools.partial(choose_box, config, keys[0])
            images = [finish_view(decode(sample.image, box, decoder), config, size, keys[0])]
        else:  # most of the work is reading the JPEG's code: once for all views
            pixels = decode(sample.image, decoder=decoder)
            images = [augment(pixels, config, size, key) for key in keys]
        mapping = self._source.label_map
        labels = tuple(mapping[label] for label in sample.labels) if mapping else sample.labels
        return [View(number, image, labels) for image in images]

    def _unusable(self, sample: RawSample | BadSample) -> str:
        if isinstance(sample, BadSample):
            return sample.reason
        mapping, index = self._source.label_map, self._source.index
        for label in sample.labels:
            if mapping and label not in mapping:
                return f"label {label} is not in the label map"
            if not mapping and label >= self._recipe.num_classes:
                return f"label {label} is out of range for model.num_classes {self._recipe.num_classes}"
        if len(sample.labels) > index.max_labels:
            return f"{len(sample.labels)} labels, the index says at most {index.max_labels}"
        return ""

    def _is_excluded(self, sample_id: int) -> bool:
        excluded = self._source.excluded
        place = int(np.searchsorted(excluded, sample_id))
        return place < len(excluded) and int(excluded[place]) == sample_id

    def _sample(self, sample_id: int) -> RawSample | BadSample:
        layout = self._source.index.layout
        chunk = int(layout.chunk_of(np.array([sample_id]))[0])
        return self._read(chunk)[sample_id - layout.chunk_ids(chunk).start]
