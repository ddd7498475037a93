"""Data workers: processes that make items ahead, and end with whoever reads them."""

import contextlib
import ctypes
import gc
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import (
    _remove_worker_pids,  # pyright: ignore[reportPrivateImportUsage]
)

from vitscale.errors import ConfigError, UserError
from vitscale.system import processes

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # malloc.h
DEATH_SECONDS = 1.0  # from the end of a worker's connection to its exit
KILLING_SECONDS = 1.0  # for the workers to end by themselves


def made_by_workers(
    dataset: Dataset[Any],
    count: int,
    num_workers: int,
    *,
    prefetched: int,
    sampler: Sequence[Any] | None = None,
    pin_memory: bool = False,
) -> Generator[Any, None, None]:
    """The first `count` items of a dataset, made by processes (0 = by this one).

    prefetched: items that each of them holds ready. sampler: what the dataset is indexed with,
    if it is. An item that is a UserError is raised; DataLoader would wrap one that is raised in
    a worker in a message of its own. Raises ConfigError as check_sockets does.
    """
    if num_workers:
        check_sockets()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        # Python 3.14's default is a fork server: the index would be sent to each worker, and a
        # scheduler's SIGTERM would end the server, and they with it.
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=prefetched if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
    )
    with processes.kill_at_exit():
        items = iter(loader)
    try:
        for _ in range(count):
            with noticing_deaths():
                item = next(items)
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        end_workers(items)


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
