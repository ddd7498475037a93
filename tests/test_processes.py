"""Worker processes: in order, bounded, and gone when their parent is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.errors import BusyError, ConfigError, DataError
from vitscale.processes import TASKS_PER_WORKER, map_in_order


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def slow_for_odd(number: int) -> int:
        time.sleep(0.002 * (number % 2))  # so that workers finish out of order
        return number * number

    assert list(map_in_order(slow_for_odd, range(40), workers)) == [n * n for n in range(40)]


def test_a_negative_number_of_workers_is_refused() -> None:
    assert list(map_in_order(abs, [-1], 0)) == [1]
    with pytest.raises(ConfigError, match="--workers -1 must not be negative"):
        list(map_in_order(abs, [-1], -1))


def test_only_a_bounded_number_of_tasks_is_under_way() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_in_order(abs, items(), 2)
    assert next(results) == 0 and len(taken) <= 2 * TASKS_PER_WORKER
    results.close()  # type: ignore[attr-defined]


def test_an_exception_of_a_worker_is_raised_and_no_worker_stays() -> None:
    def fails(number: int) -> int:
        raise DataError(f"{os.getpid()}")

    with pytest.raises(DataError) as failure:
        list(map_in_order(fails, range(10), 2))
    assert not is_running(int(str(failure.value)))


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(BusyError, match="with fewer --workers"):
        list(map_in_order(lambda _: os.kill(os.getpid(), signal.SIGKILL), [0], 1))


WAITING_WORKERS = """
import os, time
from vitscale.processes import map_in_order
def wait(item):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
list(map_in_order(wait, [0, 1], 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_workers_die_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", WAITING_WORKERS], stdout=subprocess.PIPE)
    assert parent.stdout
    with parent.stdout:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(is_running(worker) for worker in workers):
            time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
