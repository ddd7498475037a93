"""Worker processes for tools that go over many files: bounded, in order, and never left behind."""

import collections
import contextvars
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vitscale.config import ConfigError

T = TypeVar("T")
R = TypeVar("R")

TASKS_PER_WORKER = 4
_PR_SET_PDEATHSIG = 1
_function: contextvars.ContextVar[Callable[[Any], Any]] = contextvars.ContextVar("function")  # of a worker


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) of every item, in the order of the items, by `workers` processes (0: in this one).

    At most four results a worker wait to be taken, so that memory stays bounded however many items there
    are.
    The first exception of a worker is raised here; closing the iterator ends the workers. Raises
    ConfigError
    if a worker is killed.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers} must not be negative; 0 works without processes of its own")
    if workers == 0:
        yield from map(function, items)
        return
    # fork: whatever the function holds is shared with the workers instead of sent with every item
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(function, os.getpid()),
    )
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= workers * TASKS_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process was killed, probably for want of memory; run the same command again with "
            "fewer "
            "--workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One process a core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    """A SIGKILL of the parent would leave its workers running and writing: the kernel kills them with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it for all
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _function.set(function)


def _call(item: Any) -> Any:
    return _function.get()(item)
