"""The lock of a run directory: one holder, and any number of processes that look."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from vitscale.errors import BusyError
from vitscale.run_dir.lock import LOCK_NAME, RunLock

LOOKERS = 8
forked = multiprocessing.get_context("fork")


def in_processes(number: int, action: Callable[[Barrier], None]) -> list[int | None]:
    """Their exit statuses; a process that raises has 1."""
    barrier = forked.Barrier(number)
    processes = [forked.Process(target=action, args=(barrier,)) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_hosts_that_look_at_the_same_time_do_not_see_one_another(tmp_path: Path) -> None:
    RunLock(tmp_path).release()

    def look(barrier: Barrier) -> None:
        barrier.wait()
        for _ in range(200):
            RunLock.check(tmp_path)

    assert in_processes(LOOKERS, look) == [0] * LOOKERS


def test_a_holder_is_named_to_whoever_looks_and_stays_it(tmp_path: Path) -> None:
    RunLock.check(tmp_path)  # there is no lock yet
    lock = RunLock(tmp_path)

    def look(_: Barrier) -> None:
        held = (tmp_path / LOCK_NAME).read_text()  # in the holder's process, closing it would free the lock
        for _ in range(2):
            with pytest.raises(BusyError, match=r"is in use by process \d+ on .* since"):
                RunLock.check(tmp_path)
        assert held and (tmp_path / LOCK_NAME).read_text() == held

    assert in_processes(1, look) == [0]

    def damage(_: Barrier) -> None:
        for content in (b"\xff", b"[" * 100_000):
            (tmp_path / LOCK_NAME).write_bytes(content)
            for action in (RunLock, RunLock.check):
                with pytest.raises(BusyError, match="is in use by another process; end that job first"):
                    action(tmp_path)

    assert in_processes(1, damage) == [0]
    lock.release()
    RunLock.check(tmp_path)
