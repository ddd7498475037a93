"""The training stream of one rank. Worker processes read, decode and augment its lanes. The
main process joins them and copies the next batch to a GPU while the current one is trained on.

The stream is a function of (mixture, rank, world size, first step). So it can start at any
step, after a seek and the reading of at most one window per lane. A sample that cannot be used
is replaced by another one, the same whoever reads it, and reported.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.signal_handling import (
    _remove_worker_pids,  # pyright: ignore[reportPrivateImportUsage]
)

from vitscale import storage
from vitscale.data.cache import NodeCache
from vitscale.data.lane import Lane, ViewConfig
from vitscale.data.mixture import Mixture
from vitscale.data.reader import read_chunk
from vitscale.data.sources import Source
from vitscale.data.stages import Stages
from vitscale.data.transforms import finish_views
from vitscale.errors import ConfigError, UserError
from vitscale.system import processes

T = TypeVar("T")
PREFETCHED_STEPS = 2  # per worker
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # malloc.h
CLOSING_SECONDS = 10.0  # for a batch that is under way when the run is asked to stop
DEATH_SECONDS = 1.0  # from the end of a worker's connection to its exit
KILLING_SECONDS = 1.0  # for the workers to end by themselves
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
    if workers:
        check_sockets()
    stream.mixture.draw_epochs(stream.first_step)  # once, and shared by the workers
    loader = DataLoader(
        _WorkerStream(stream),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED_STEPS if workers else None,
        worker_init_fn=prepare_worker,
    )
    # With an iterable dataset, the loader asks the workers in turn: item i is worker i % n's.
    with processes.kill_at_exit():
        parts = iter(loader)
    try:
        for _ in range(stream.first_step, stream.last_step):
            with noticing_deaths():
                received = [next(parts) for _ in range(max(1, workers))]
            yield _join(received)
    finally:
        end_workers(parts)


def end_workers(parts: Any) -> None:
    """End the workers of a DataLoader's iterator, and kill those that do not end in a second.

    The loader waits 10 s for each that is in the midst of a read, and for ever for a lock
    that a killed one may have held: where one is dead, all are killed.
    """
    workers = getattr(parts, "_workers", ())  # none if this process reads
    if not workers or sys.is_finalizing():  # then they have ended, and no thread can start
        return
    if parts._worker_pids_set:  # read to its end, the loader has done so itself
        _remove_worker_pids(id(parts))  # else it raises an error for each kill
        parts._worker_pids_set = False
    if all(worker.is_alive() for worker in workers):
        killing = threading.Timer(KILLING_SECONDS, lambda: [worker.kill() for worker in workers])
        killing.start()
        parts._shutdown_workers()
        killing.cancel()
        return
    parts._shutdown = True  # the loader has nothing left to end
    for worker, indices in zip(workers, parts._index_queues, strict=True):
        worker.kill()
        indices.cancel_join_thread()
    if hasattr(parts, "_pin_memory_thread"):
        parts._pin_memory_thread_done_event.set()


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


@contextlib.contextmanager
def noticing_deaths() -> Iterator[None]:
    """Around what reads from data workers: a lost connection may be the first sign of a death.

    torch's own error comes a moment later, with SIGCHLD, in the main thread.
    """
    try:
        yield
    except (EOFError, OSError):
        time.sleep(DEATH_SECONDS)
        raise


def check_sockets() -> None:
    """Raise ConfigError if data workers cannot make the sockets that hand their tensors over.

    They would fail in a thread, and what reads from them would wait forever. The path of a
    socket has at most 107 bytes; 32 of them are multiprocessing's.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/listener-{'_' * 8}")
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()}: data workers cannot make a socket in {tempfile.tempdir} ({error}); "
            "set TMPDIR=/tmp, or num_workers = 0"
        ) from None


def prepare_worker(_: int) -> None:
    """What a data worker does first: it outlives the signals of a scheduler, until the save."""
    gc.enable()  # the trainer, from which this process was forked, collects at its own times
    processes.survive_signals()
    reuse_memory()


def reuse_memory() -> None:
    """Let glibc keep freed memory for the next chunk, in this process.

    To map and clear fresh memory for every chunk costs more than to read the chunk.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(_M_ARENA_MAX, 1)


def _join(parts: Sequence[dict[str, Any]]) -> Batch:
    for part in parts:
        if "error" in part:
            raise part["error"]
    images, labels, ids = (
        parts[0][name] if len(parts) == 1 else torch.cat([part[name] for part in parts])
        for name in ("images", "labels", "ids")
    )
    bad = [sentence for part in parts for sentence in part["bad"]]
    return Batch(images, labels, ids.numpy(), bad, Stages.total(part["stages"] for part in parts))


class _WorkerStream(IterableDataset[dict[str, Any]]):
    """Yields a worker's part of each step.

    A UserError is sent as data: DataLoader would wrap what is raised in its own message.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        lane_numbers = np.array_split(np.array(self.stream.lanes), num_workers)[worker].tolist()
        for source in self.stream.sources:
            storage.connect(source.index.shards[0].url)
        threads = ThreadPoolExecutor(READ_THREADS)
        try:
            yield from self._steps(lane_numbers, threads)
        except UserError as error:
            yield {"error": error}
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _steps(self, lane_numbers: list[int], threads: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
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
            part = {
                "images": finish_views(boxes, stream.view_config.augment, keys),
                "labels": pad_labels(labels, stream.max_labels),
                "ids": torch.tensor([key.sample for key in keys]),
                "bad": [sentence for lane in lanes for sentence in lane.take_bad()],
            }
            finished = time.perf_counter()
            read_before, read = read, sum(lane.read_seconds for lane in lanes)
            waited = read - read_before
            part["stages"] = Stages(waited, decoded - began - waited, finished - decoded, idle)
            yield part
            idle = time.perf_counter() - finished  # told with the next part


def pad_labels(labels: Sequence[tuple[int, ...]], max_labels: int) -> Int64[Tensor, "n M"]:
    """The labels of n samples as a table of M = max_labels columns, padded with -1."""
    return torch.tensor([(*row, *[-1] * (max_labels - len(row))) for row in labels])
