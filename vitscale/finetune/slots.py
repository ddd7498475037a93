"""Slots: where processes that share the GPUs or the cores of one machine may run."""

import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from vitscale.errors import PREEMPTED, Terminated
from vitscale.system import processes
from vitscale.system.cores import num_cores

PYTHON = (sys.executable, "-u")
# An accuracy; None = the run has diverged.
Score = TypeVar("Score", bound=float | None)


class Slots:
    """Where processes may run at the same time: one on each GPU, or on a share of the cores.

    A context, for the main thread: processes that live on at its end are stopped, and save. A
    SIGTERM ends it by Terminated. If this process is killed, the kernel stops the others.
    """

    def __init__(self, count: int = 0, num_gpus: int | None = None) -> None:
        """count: 0 = one on each GPU. num_gpus: None = all of this machine."""
        num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
        self.count = count = count or max(1, num_gpus)
        self._free = list(range(count))
        self._changed = threading.Condition()
        self._gpus = _names_of_gpus(num_gpus)
        self._threads = max(1, num_cores() // count)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __enter__(self) -> "Slots":
        self._previous = signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._previous)

    def stop(self) -> None:
        """Start nothing more, and stop what runs."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            process.wait()

    def run(self, command: Sequence[str | Path], log: Path, launcher: Sequence[str] = PYTHON) -> int:
        """Run a command in a free slot, its output to `log`, and return its exit status.

        launcher: what starts the program that the command begins with.
        """
        with self._slot() as slot, open(log, "ab") as output:
            if self._stopped:
                return PREEMPTED
            environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
            if self._gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
            process = subprocess.Popen(
                [*launcher, *map(str, command)],
                env=environment,
                stdout=output,
                stderr=output,
                # With this thread, which waits for it.
                preexec_fn=functools.partial(processes.die_with, os.getpid(), signal.SIGTERM),
            )
            self._running.add(process)
            if self._stopped:  # while it was started, so that stop() may not have seen it
                process.terminate()
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[int]:
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            slot = self._free.pop(0)
        try:
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()


def in_slots(
    actions: Mapping[str, Callable[[], list[Score]]], slots: Slots, said: Callable[[str], object]
) -> list[list[Score]]:
    """The accuracies that actions find, in their order; each waits for a slot by itself.

    said: gets a line when one is done. If one fails, the others are stopped.
    """
    with concurrent.futures.ThreadPoolExecutor(slots.count) as pool:
        futures = {pool.submit(action): name for name, action in actions.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                said(done_line(futures[future], future.result()))
        except BaseException:  # Ctrl-C too: the pool would wait for all that is left
            pool.shutdown(wait=False, cancel_futures=True)
            slots.stop()
            raise
        return [future.result() for future in futures]


def done_line(name: str, scores: Sequence[float | None]) -> str:
    return f"{name:<22} {' '.join('diverged' if v is None else f'{100 * v:6.2f}' for v in scores)}"


def _terminate(*_: object) -> None:
    """Handle a SIGTERM; of those that follow while processes save, none breaks that off.

    Not by SIG_IGN, which a process that is started meanwhile would inherit.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise Terminated


def _names_of_gpus(num_gpus: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:num_gpus] if named else [str(index) for index in range(num_gpus)]
