"""One lane's training samples, in order: read ahead by threads, decoded, cropped and resized;
damaged ones are replaced.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitscale import rng
from vitscale.data.decode import DamagedImage, Decoder, cut, decode
from vitscale.data.mixture import Mixture
from vitscale.data.order import Order, Window
from vitscale.data.reader import Chunk, describe
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import Source, label_problem
from vitscale.data.transforms import AugmentConfig, ViewKey, choose_box, resize_box
from vitscale.errors import DataError
from vitscale.image_size import ImageSize

MAX_REPLACEMENTS = 100
READ_AHEAD = 1 / 8  # the part of a window that is still to come when the next one is requested

ReadChunk = Callable[[int], Chunk]


class ViewConfig(NamedTuple):
    """How samples are made into training views, the same for all samples of a run."""

    augment: AugmentConfig
    decoder: Decoder
    image_size: ImageSize
    num_classes: int


class ResizedBox(NamedTuple):
    """The box of a decoded sample that a training view shows, resized: for finish_views.

    key: of the view; its sample is numbered through all sources.
    """

    key: ViewKey
    pixels: UInt8[np.ndarray, "H W 3"]
    labels: tuple[int, ...]


class Lane:
    """A lane from its first draw of `first_step` on.

    readers: what reads a chunk of each source. threads: where they are called.
    read_seconds: for how long it has waited for them.
    """

    def __init__(
        self,
        number: int,
        first_step: int,
        mixture: Mixture,
        sources: tuple[Source, ...],
        view_config: ViewConfig,
        readers: tuple[ReadChunk, ...],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._number, self._mixture, self._draw = number, mixture, first_step * mixture.draws_per_step
        self._draws_per_step, self._bad = mixture.draws_per_step, list[str]()
        self.read_seconds = 0.0
        drawn_before = mixture.counts(number, self._draw)  # from each source
        self._readers = [
            _WindowReader(order, source, number, first_draw, read, threads)
            for order, source, first_draw, read in zip(
                mixture.orders, sources, drawn_before, readers, strict=True
            )
        ]
        self._augmenters = [
            Augmenter(source, first_id, read, view_config, mixture.seed, self._bad)
            for source, first_id, read in zip(sources, mixture.first_ids, readers, strict=True)
        ]

    def take_step(self) -> list[ResizedBox]:
        """The boxes of a step, in batch order: those of each draw's first view come first."""
        by_draw = []
        for _ in range(self._draws_per_step):
            source, _ = self._mixture.source_of(self._number, self._draw)
            self._draw += 1
            began = time.perf_counter()
            drawn = self._readers[source].take()
            self.read_seconds += time.perf_counter() - began
            by_draw.append(self._augmenters[source].make(*drawn))
        return [boxes[number] for number in range(self._mixture.repeats) for boxes in by_draw]

    def take_bad(self) -> list[str]:
        """One sentence for each sample that was replaced since the last call."""
        bad = self._bad.copy()
        self._bad.clear()
        return bad


class _Request(NamedTuple):
    """A window that is being read. wanted: the samples to hold for it and for the next one."""

    window: Window
    wanted: set[int]
    reads: list[Future[dict[int, RawSample | BadSample]]]


class _WindowReader:
    """The undecoded samples of one source in one lane, in drawing order.

    A window may end inside a chunk. What the next one needs of that chunk is then held, so that
    no chunk is read twice. Chunks and windows of 4 samples, a lane that begins inside a chunk:

        chunk      28-31 |    8-11     |    20-23
        sample id  30 31 |  8  9 10 11 | 20 21 22 23
        window      1  1 |  1  1  2  2 |  2  2  3  3

        window           held before    chunks read    held then
        1  30 31  8  9   -              28-31, 8-11    30 31 8 9 10 11
        2  10 11 20 21   10 11          20-23          10 11 20 21 22 23

    A window is requested shortly before it begins, and a sample is dropped when it is drawn: a
    lane holds about one window and the rest of a chunk.
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
        """Begin to read the next window: those of its chunks that are not held."""
        window = next(self._windows)
        drawn = window.ids[window.skip :].tolist()
        # What is held for the old epoch is drawn there: the new epoch reads the sample again.
        held = self._held if window.epoch == self._epoch else {}
        missing = np.array([sample_id for sample_id in drawn if sample_id not in held], dtype=np.int64)
        # The chunk in which the window ends holds the first samples of the next one.
        end = self._layout.chunk_ids(self._layout.chunk_with(window.last)).stop
        wanted = {*drawn, *range(window.last + 1, end)}
        chunks = np.unique(self._layout.chunk_of(missing)).tolist()
        reads = [self._threads.submit(self._fetch, chunk, wanted) for chunk in chunks]
        return _Request(window, wanted, reads)

    def _fetch(self, chunk: int, wanted: set[int]) -> dict[int, RawSample | BadSample]:
        samples = zip(self._layout.chunk_ids(chunk), self._read(chunk), strict=True)
        return {sample_id: _detached(sample) for sample_id, sample in samples if sample_id in wanted}

    def _advance(self) -> None:
        """Pass to the next window, and wait for its reads."""
        window, wanted, reads = self._next or self._request()
        self._next = None
        self._epoch, self._pending = window.epoch, window.ids[window.skip :].tolist()[::-1]
        self._held = {sample_id: sample for sample_id, sample in self._held.items() if sample_id in wanted}
        for read in reads:
            self._held |= read.result()


def _detached(sample: RawSample | BadSample) -> RawSample | BadSample:
    """The sample with a copy of its image: a view would keep its whole chunk in memory."""
    if isinstance(sample, BadSample):
        return sample
    return sample._replace(image=bytes(sample.image))


class Augmenter:
    """Makes the views of one source's samples.

    A sample that cannot be used is replaced by another one of its source, chosen by the seed
    and the sample alone. `bad` gets a sentence for each, except for those that are excluded.
    """

    def __init__(
        self,
        source: Source,
        first_id: int,
        read: ReadChunk,
        view_config: ViewConfig,
        seed: int,
        bad: list[str],
    ) -> None:
        self._source, self._first_id, self._read = source, first_id, read
        self._config, self._seed, self._bad = view_config, seed, bad

    def make(self, epoch: int, sample_id: int, sample: RawSample | BadSample) -> list[ResizedBox]:
        """What the `repeats` views of a sample, or of its replacement, in an epoch are made of.

        Raises DataError if 100 samples in a row cannot be used.
        """
        drawn, reason = sample_id, ""
        for attempt in range(MAX_REPLACEMENTS):
            if self._source.is_trained_on(sample_id):
                reason = self._unusable(sample)
                if isinstance(sample, RawSample) and not reason:
                    try:
                        return self._boxes(sample, epoch, sample_id)
                    except DamagedImage as error:
                        reason = str(error)
                self._bad.append(f"{describe(self._source.index, sample_id)}: sample {sample.key}: {reason}")
            draw = rng.uniform(1, self._seed, "replace", self._first_id + drawn, attempt)[0]
            sample_id = self._source.replacement(draw)
            sample = self._sample(sample_id)
        raise DataError(
            f"{MAX_REPLACEMENTS} samples in a row could not be used, the last for: {reason or 'exclusion'}; "
            "see what is left with: python tools/data.py verify INDEX"
        )

    def _boxes(self, sample: RawSample, epoch: int, sample_id: int) -> list[ResizedBox]:
        config, decoder, size, _ = self._config
        run_id = self._first_id + sample_id  # through all sources
        mapping = self._source.label_map
        labels = tuple(mapping[label] for label in sample.labels) if mapping else sample.labels
        if config.repeats == 1:
            key = ViewKey(self._seed, epoch, run_id)
            box = decode(sample.image, functools.partial(choose_box, config, key), decoder)
            return [ResizedBox(key, resize_box(box, size), labels)]
        # Most of the work is to decode the JPEG: once for all views.
        pixels = decode(sample.image, decoder=decoder)
        keys = [ViewKey(self._seed, epoch, run_id, view) for view in range(config.repeats)]
        boxes = [cut(pixels, choose_box(config, key, *pixels.shape[:2])) for key in keys]
        return [ResizedBox(key, resize_box(box, size), labels) for key, box in zip(keys, boxes, strict=True)]

    def _unusable(self, sample: RawSample | BadSample) -> str:
        """Why a sample cannot be used, "" if it can."""
        if isinstance(sample, BadSample):
            return sample.why()
        if not sample.labels:
            return "it has no label, and training needs one"
        index = self._source.index
        if len(sample.labels) > index.max_labels:
            return f"{len(sample.labels)} labels, the index says at most {index.max_labels}"
        return label_problem(sample.labels, index, self._source.label_map, self._config.num_classes)

    def _sample(self, sample_id: int) -> RawSample | BadSample:
        layout = self._source.index.layout
        chunk = layout.chunk_with(sample_id)
        return self._read(chunk)[sample_id - layout.chunk_ids(chunk).start]
