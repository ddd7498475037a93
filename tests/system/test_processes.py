"""Worker processes: in order, bounded, and gone when their parent is."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from make import write_index

from vitscale.errors import BusyError, ConfigError, DataError
from vitscale.system.processes import TASKS_PER_WORKER, map_in_order, no_garbage_collection


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


def test_within_the_block_garbage_is_collected_by_the_caller_alone() -> None:
    assert gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


WAITING_WORKERS = """
import os, time
from vitscale.system.processes import map_in_order
def wait(item):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
list(map_in_order(wait, [0, 1], 2))
"""


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


OPEN_LOADER = """
import os, sys
from vitscale.data.index import Index
from vitscale.data.loader import Stream, batches
from vitscale.data.lane import ViewConfig
from vitscale.data.transforms import AugmentConfig
from vitscale.data.data_config import DataConfig
from vitscale.data.sources import make_mixture, open_sources
sources = open_sources(DataConfig(index=sys.argv[1]))
mixture = make_mixture(sources, DataConfig(index=sys.argv[1], lanes=4), seed=0, global_batch=8, repeats=1)
stream = Stream(sources=sources, mixture=mixture, view_config=ViewConfig(AugmentConfig(), "pillow", 8, 5),
                lanes=range(4), first_step=0, last_step=100)
open_batches = batches(stream, 2)
next(open_batches)
parts = open_batches.gi_frame.f_locals["made"].gi_frame.f_locals["items"]
cycle = [parts]
cycle.append(cycle)  # as a traceback holds it: nothing closes the loader before the interpreter's end
print(*[worker.pid for worker in parts._workers], flush=True)
if sys.argv[2] == "finished":
    open_batches.close()
else:
    cycle.append(open_batches)
if sys.argv[2] == "wait":
    import time
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["exit", "finished", "wait"])
def test_data_workers_end_with_their_parent_however_it_ends(tmp_path: Path, end: str) -> None:
    """At its exit with an open loader, and by a SIGKILL; not by anybody else's SIGTERM."""
    index = write_index(tmp_path / "shards", [40, 37, 20])
    parent = subprocess.Popen(
        [sys.executable, "-c", OPEN_LOADER, str(index), end], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert parent.stdout and parent.stderr
    workers: list[int] = []
    with parent.stdout, parent.stderr:
        try:
            workers = list(map(int, parent.stdout.readline().split()))
            assert len(workers) == 2, parent.stderr.read().decode()
            if end == "wait":
                for worker in workers:
                    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                        os.kill(worker, number)
                time.sleep(0.5)
                assert all(is_running(worker) for worker in workers)
                parent.kill()
            assert parent.wait(20) == (-signal.SIGKILL if end == "wait" else 0)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and any(is_running(worker) for worker in workers):
                time.sleep(0.05)
            assert not any(is_running(worker) for worker in workers)
        finally:
            for pid in (parent.pid, *workers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
