"""Worker processes: bounded, in order, and never left behind."""

import atexit
import collections
import contextlib
import contextvars
import ctypes
import gc
import multiprocessing.process
import multiprocessing.util
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vitscale.errors import BusyError, ConfigError

T = TypeVar("T")
R = TypeVar("R")
# Called with (done, total), before the first item and after every one that is finished.
ProgressCallback = Callable[[int, int], None]

TASKS_PER_WORKER = 4
_PR_SET_PDEATHSIG = 1
_function: contextvars.ContextVar[Callable[[Any], Any]] = contextvars.ContextVar("function")  # of a worker


def no_progress(done: int, total: int) -> None:
    """The ProgressCallback of a caller whom nobody watches."""


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) of every item, in the order of the items, by `workers` processes.

    workers: 0 = in this process. At most four results per worker wait to be taken, so that
    memory stays bounded for any number of items. A worker's exception is raised here; closing
    the iterator ends the workers. Raises BusyError if a worker is killed.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers} must not be negative; 0 works in the main process")
    if workers == 0:
        yield from map(function, items)
        return
    # fork: what the function holds is shared with the workers, instead of sent with every item
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
        raise BusyError(
            "a worker process was killed, probably for lack of memory; "
            "run the same command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent, of this process id, dies.

    Otherwise a SIGKILL of the parent would leave its workers running, reading and writing. The
    end of the thread that started this process counts as the parent's death.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)


def survive_signals() -> None:
    """Let neither a scheduler nor a terminal end this worker, but the death of its parent.

    A scheduler signals every process of a job, and a trainer still needs its workers for the
    steps up to the save. Such a worker has to be killed (kill_at_exit).
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with(os.getppid())


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within the block, garbage is collected only when the caller calls gc.collect().

    Otherwise each rank would stop for it at a step of its own, and all others wait.
    """
    gc.collect()
    gc.freeze()  # what start-up made stays, and need not be searched
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def kill_at_exit() -> Iterator[None]:
    """The child processes that start within the block are killed when the interpreter exits.

    multiprocessing's own hook sends SIGTERM, and then waits for ever if a child ignores that.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _killed_at_exit.update(set(multiprocessing.active_children()) - others)


_killed_at_exit: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()
os.register_at_fork(after_in_child=_killed_at_exit.clear)  # they are the parent's


@atexit.register  # after multiprocessing.util's hook, and so called before it
def _kill() -> None:
    for child in list(_killed_at_exit):
        child.kill()


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent responds for all
    die_with(parent)
    _function.set(function)


def _call(item: Any) -> Any:
    return _function.get()(item)
