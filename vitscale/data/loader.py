"""The training stream of one rank: worker processes read, decode and augment its lanes; the main process
joins them.

The stream is a function of (order, rank, world size, first step): a restart begins at any step, by a seek and
the reading of at most one window per lane. A sample that cannot be used is replaced by a deterministic other
one, and reported.
"""

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitscale import rng
from vitscale.config import ConfigError
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import DataError, Index
from vitscale.data.order import EpochOrder, Order, default_lanes
from vitscale.data.reader import Chunk, describe, pick, read_window
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.transforms import AugmentConfig, augment

MAX_REPLACEMENTS = 100
PREFETCHED_STEPS = 4  # per worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data ([data]).

    lanes: the streams that every global batch is put together from; the world size must divide it, and the
    order depends on it. 0 = the largest divisor of global_batch up to 1,024. Each lane holds window_chunks +
    1 chunks in memory.
    """

    index: str = ""
    labels: Literal["single", "multi"] = "single"
    lanes: int = 0
    window_chunks: int = 4
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.lanes < 0 or self.window_chunks < 1:
            raise ConfigError(
                f"data.lanes {self.lanes} must be 0 or more, data.window_chunks {self.window_chunks} 1 or "
                "more"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction {self.max_bad_fraction} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, in batch order.

    images uint8 [n, 3, S, S]; labels int64 [n, M], padded with -1; ids int64 [n], as delivered (after
    replacements);
    bad: one sentence for each sample that had to be replaced.
    """

    images: UInt8[Tensor, "n 3 S S"]
    labels: Int64[Tensor, "n M"]
    ids: Int64[np.ndarray, " n"]
    bad: list[str]


def make_order(index: Index, config: DataConfig, seed: int, global_batch: int) -> Order:
    """The order of a run over an index. Raises ConfigError where they do not fit."""
    return Order(
        chunk_counts=index.chunk_counts,
        seed=seed,
        global_batch=global_batch,
        lanes=config.lanes or default_lanes(global_batch),
        window_samples=config.window_chunks * index.chunk_samples,
    )


def check_labels(index: Index, config: DataConfig, num_classes: int) -> None:
    """Raise ConfigError if the index holds labels that the model or the config has no place for."""
    if index.max_label >= num_classes:
        raise ConfigError(
            f"{config.index} holds label {index.max_label}, out of range for model.num_classes {num_classes} "
            f"(labels run from 0 to {num_classes - 1}); set model.num_classes = {index.max_label + 1} or "
            "mend the labels"
        )
    if config.labels == "single" and index.max_labels > 1:
        raise ConfigError(
            f'{config.index} has samples with {index.max_labels} labels; set data.labels = "multi" and '
            'loss.name = "sigmoid"'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """What every worker of a rank needs to know; plain values, to be handed to another process."""

    index: Index
    order: Order
    augment: AugmentConfig
    image_size: int
    num_classes: int
    lanes: range
    first_step: int
    last_step: int


def batches(stream: Stream, num_workers: int) -> Iterator[Batch]:
    """The batches of steps first_step to last_step (0-based, end excluded) for the stream's lanes.

    The lanes are divided among `num_workers` processes (0 = read in this one). Raises DataError when data
    cannot be used.
    """
    workers = min(num_workers, len(stream.lanes))
    loader = DataLoader(
        _WorkerStream(stream),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED_STEPS if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    # With an iterable dataset the loader asks the workers in turn: item i comes from worker i % n.
    parts = iter(loader)
    for _ in range(stream.first_step, stream.last_step):
        yield _join([next(parts) for _ in range(max(1, workers))])


def _leave_signals_to_the_trainer(_: int) -> None:
    """A scheduler signals every process of a job: the trainer still needs its workers for the steps up to the
    save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _join(parts: Sequence[dict[str, Any]]) -> Batch:
    for part in parts:
        if "error" in part:
            raise DataError(part["error"])
    images, labels, ids = (
        parts[0][name] if len(parts) == 1 else torch.cat([part[name] for part in parts])
        for name in ("images", "labels", "ids")
    )
    return Batch(images, labels, ids.numpy(), [sentence for part in parts for sentence in part["bad"]])


class _WorkerStream(IterableDataset[dict[str, Any]]):
    """Yields the worker's lanes of each step. Errors travel as data, so that the user reads our sentence
    alone.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, total = (info.id, info.num_workers) if info else (0, 1)
        lanes = [int(lane) for lane in np.array_split(np.array(self.stream.lanes), total)[number]]
        try:
            yield from _read_steps(self.stream, lanes)
        except (DataError, ConfigError) as error:
            yield {"error": str(error)}


def _read_steps(stream: Stream, lanes: list[int]) -> Iterator[dict[str, Any]]:
    steps = stream.order.steps_per_epoch
    step = stream.first_step
    while step < stream.last_step:
        epoch, first = divmod(step, steps)
        epoch_order = stream.order.epoch(epoch)
        readers = [_Lane(stream, epoch_order, lane, first) for lane in lanes]
        for _ in range(min(steps - first, stream.last_step - step)):
            samples = [sample for reader in readers for sample in reader.take(stream.order.per_lane)]
            yield _collate(
                samples,
                [sentence for reader in readers for sentence in reader.take_bad()],
                stream.index.max_labels,
            )
            step += 1


def _collate(
    samples: list[tuple[int, Tensor, tuple[int, ...]]], bad: list[str], max_labels: int
) -> dict[str, Any]:
    ids, images, labels = zip(*samples, strict=True)
    return {
        "images": torch.stack(images),
        "labels": pad_labels(labels, max_labels),
        "ids": torch.tensor(ids),
        "bad": bad,
    }


def pad_labels(labels: Sequence[tuple[int, ...]], max_labels: int) -> Int64[Tensor, "n M"]:
    """Labels as a table padded with -1: [n, max_labels]."""
    return torch.tensor([(*row, *[-1] * (max_labels - len(row))) for row in labels])


class _Lane:
    """One lane's decoded samples in order; holds the chunks of one window."""

    def __init__(self, stream: Stream, order: EpochOrder, lane: int, first_step: int) -> None:
        self.stream, self.epoch = stream, order.epoch
        self.windows = order.lane_stream(lane, first_step)
        self.chunks: dict[int, Chunk] = {}
        self.pending: list[int] = []
        self.bad: list[str] = []

    def take(self, count: int) -> list[tuple[int, Tensor, tuple[int, ...]]]:
        """The next `count` samples: (id, image uint8 [3, S, S], labels)."""
        return [self._decode(self._next_id()) for _ in range(count)]

    def take_bad(self) -> list[str]:
        """The sentences about samples replaced since the last call."""
        bad, self.bad = self.bad, []
        return bad

    def _next_id(self) -> int:
        if not self.pending:
            skip, ids = next(self.windows)
            self.chunks = read_window(self.stream.index, ids.tolist(), self.chunks)
            self.pending = ids[skip:].tolist()[::-1]
        return self.pending.pop()

    def _decode(self, sample_id: int) -> tuple[int, Tensor, tuple[int, ...]]:
        stream, first_id, chunks = self.stream, sample_id, self.chunks
        for attempt in range(MAX_REPLACEMENTS):
            sample = pick(stream.index, chunks, sample_id)
            reason = self._unusable(sample)
            if isinstance(sample, RawSample) and not reason:
                try:
                    view = augment(
                        decode(sample.image),
                        stream.augment,
                        stream.image_size,
                        stream.order.seed,
                        self.epoch,
                        sample_id,
                    )
                    return sample_id, view, sample.labels
                except DamagedImage as error:
                    reason = str(error)
            self.bad.append(f"{describe(stream.index, sample_id)}: sample {sample.key}: {reason}")
            draw = rng.uniform(1, stream.order.seed, "replace", first_id, attempt)[0]
            sample_id = int(draw * stream.index.num_samples)
            chunks = read_window(stream.index, [sample_id], self.chunks)
        raise DataError(
            f"{MAX_REPLACEMENTS} samples in a row could not be used, the first "
            f"{self.bad[-MAX_REPLACEMENTS]}; see what is left with: python tools/data.py verify INDEX"
        )

    def _unusable(self, sample: RawSample | BadSample) -> str:
        if isinstance(sample, BadSample):
            return sample.reason
        wrong = [label for label in sample.labels if label >= self.stream.num_classes]
        if wrong:
            return f"label {wrong[0]} is out of range for model.num_classes {self.stream.num_classes}"
        if len(sample.labels) > self.stream.index.max_labels:
            return f"{len(sample.labels)} labels, the index says at most {self.stream.index.max_labels}"
        return ""
