"""The training stream of one rank. Worker processes read, decode and augment its lanes. The
main process joins them and copies the next batch to a GPU while the current one is trained on.

The stream is a function of (mixture, rank, world size, first step). So it can start at any
step, after a seek and the reading of at most one window per lane. A sample that cannot be used
is replaced by another one, the same whoever reads it, and reported.
"""

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vitscale.data.cache import NodeCache
from vitscale.data.lane import Lane, ViewConfig
from vitscale.data.mixture import Mixture
from vitscale.data.reader import read_chunk
from vitscale.data.sources import Source
from vitscale.data.stages import Stages
from vitscale.data.transforms import finish_views
from vitscale.data.workers import made_by_workers
from vitscale.errors import UserError
from vitscale.stores import storage

T = TypeVar("T")
PREFETCHED_STEPS = 2  # per worker
CLOSING_SECONDS = 10.0  # for a batch that is under way when the run is asked to stop
READ_THREADS = 8  # per worker: reads wait for disks and stores, not for a core


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, in batch order.

    labels: padded with -1. ids: of the samples that are delivered (after replacements),
    numbered through all sources. bad: one sentence for each sample that had to be replaced.
    stages: what the workers that made it have spent on it.
    """

    images: UInt8[Tensor, "n 3 H W"]
    labels: Int64[Tensor, "n M"]
    ids: Int64[np.ndarray, " n"]
    bad: list[str]
    stages: Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """What the workers of a rank need: plain values, which can be sent to another process.

    lanes: those of the rank. first_step, last_step: 0-based, the end excluded. cache: where
    chunks of remote shards are kept on this node; None = nowhere.
    """

    sources: tuple[Source, ...]
    mixture: Mixture
    view_config: ViewConfig
    lanes: range
    first_step: int
    last_step: int
    cache: NodeCache | None = None

    @property
    def max_labels(self) -> int:
        return max(source.index.max_labels for source in self.sources)


def batches(stream: Stream, num_workers: int) -> Generator[Batch, None, None]:
    """The stream's batches, one a step.

    The lanes are divided among `num_workers` processes (0 = read in this one). Raises DataError
    if the data cannot be used, StoreError if a store does not answer, and ConfigError as
    check_sockets does.
    """
    workers = min(num_workers, len(stream.lanes))
    stream.mixture.draw_epochs(stream.first_step)  # once, and shared by the workers
    # With an iterable dataset, the loader asks the workers in turn: item i is worker i % n's.
    num_parts, num_steps = max(1, workers), stream.last_step - stream.first_step
    dataset = _WorkerStream(stream)
    made = made_by_workers(dataset, num_steps * num_parts, workers, prefetched=PREFETCHED_STEPS)
    with contextlib.closing(made):
        for _ in range(num_steps):
            yield _join([next(made) for _ in range(num_parts)])


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The batches with images and labels on `device`.

    For a GPU a thread joins each batch and pins its memory, and it is copied on a side stream,
    while the ones before it are in use.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ahead: Batch | None = None
    with contextlib.closing(in_thread(batches, _pinned)) as pinned:
        for batch in pinned:
            with torch.cuda.stream(side):
                copied = dataclasses.replace(
                    batch,
                    images=batch.images.to(device, non_blocking=True),
                    labels=batch.labels.to(device, non_blocking=True),
                )
            if ahead is not None:
                yield ahead
            torch.cuda.current_stream(device).wait_stream(side)
            for tensor in (copied.images, copied.labels):
                tensor.record_stream(torch.cuda.current_stream(device))
            ahead = copied
        if ahead is not None:
            yield ahead


def _pinned(batch: Batch) -> Batch:
    return dataclasses.replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())


def in_thread(items: Iterator[T], prepare: Callable[[T], T]) -> Generator[T, None, None]:
    """prepare(item) for each item, by a thread that is two ahead. What it raises is raised."""
    # The first is taken here: workers that it forks die with the thread that forked them.
    first = next(items, None)
    if first is None:
        return
    # One waits here, and one in the thread for room.
    done: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    closing = threading.Event()
    taken = [first]
    del first  # an item may hold shared memory: it goes as soon as it is prepared

    def work() -> None:
        error = None
        try:
            while (item := taken.pop() if taken else next(items, None)) is not None:
                prepared = prepare(item)
                del item
                done.put((prepared, None))
                del prepared
                if closing.is_set():
                    return
        except BaseException as raised:
            error = raised
        done.put((None, error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (pair := done.get())[0] is not None:
            yield pair[0]
        if pair[1] is not None:
            raise pair[1]
    finally:
        closing.set()
        with contextlib.suppress(queue.Empty):
            done.get_nowait()  # a thread that waits for room goes on, and ends
        thread.join(CLOSING_SECONDS)


def _join(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return Batch(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        bad=[sentence for part in parts for sentence in part.bad],
        stages=Stages.total(part.stages for part in parts),
    )


class _WorkerStream(IterableDataset[Batch | UserError]):
    """Yields a worker's part of each step, or the UserError that ends it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        lane_numbers = np.array_split(np.array(self.stream.lanes), num_workers)[worker].tolist()
        for source in self.stream.sources:
            storage.connect(source.index.shards[0].url)
        threads = ThreadPoolExecutor(READ_THREADS)
        try:
            yield from self._steps(lane_numbers, threads)
        except UserError as error:
            yield error
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _steps(self, lane_numbers: list[int], threads: ThreadPoolExecutor) -> Iterator[Batch]:
        stream = self.stream
        readers = tuple(
            functools.partial(read_chunk, source.index, cache=stream.cache) for source in stream.sources
        )
        lanes = [
            Lane(n, stream.first_step, stream.mixture, stream.sources, stream.view_config, readers, threads)
            for n in lane_numbers
        ]
        read, idle = 0.0, 0.0
        for _ in range(stream.first_step, stream.last_step):
            began = time.perf_counter()
            keys, boxes, labels = zip(*(box for lane in lanes for box in lane.take_step()), strict=True)
            decoded = time.perf_counter()
            images = finish_views(boxes, stream.view_config.augment, keys)
            padded, ids = pad_labels(labels, stream.max_labels), np.array([key.sample for key in keys])
            bad = [sentence for lane in lanes for sentence in lane.take_bad()]
            finished = time.perf_counter()
            read_before, read = read, sum(lane.read_seconds for lane in lanes)
            waited = read - read_before
            yield Batch(
                images, padded, ids, bad, Stages(waited, decoded - began - waited, finished - decoded, idle)
            )
            idle = time.perf_counter() - finished  # told with the next part


def pad_labels(labels: Sequence[tuple[int, ...]], max_labels: int) -> Int64[Tensor, "n M"]:
    """The labels of n samples as a table of M = max_labels columns, padded with -1."""
    return torch.tensor([(*row, *[-1] * (max_labels - len(row))) for row in labels])
