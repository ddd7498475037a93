"""What the loader's workers and its thread hold and collect, and how they end."""

import gc
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from vitscale.data import workers as data_workers
from vitscale.data.loader import in_thread
from vitscale.data.workers import made_by_workers, prepare_worker
from vitscale.errors import DataError
from vitscale.system.processes import no_garbage_collection


class Collecting(IterableDataset[bool]):
    """Whether the process that reads it collects garbage."""

    def __iter__(self) -> Iterator[bool]:
        yield gc.isenabled()


def test_a_data_worker_collects_garbage_although_its_trainer_does_not() -> None:
    with no_garbage_collection():
        assert [*made_by_workers(Collecting(), 1, 1, prefetched=1)] == [True] and not gc.isenabled()


@pytest.fixture
def forkserver() -> Iterator[None]:
    """Python 3.14's default."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(default, force=True)


@pytest.mark.usefixtures("forkserver")
def test_data_workers_are_forked_from_their_trainer_in_every_version_of_python() -> None:
    class Parent(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield os.getppid()

    assert [*made_by_workers(Parent(), 1, 1, prefetched=1)] == [os.getpid()]


def test_a_thread_prepares_two_items_ahead_and_no_more() -> None:
    prepared = threading.Semaphore(0)

    def prepare(item: int) -> int:
        prepared.release()
        return 10 * item

    items = in_thread(iter(range(9)), prepare)
    for item in range(3):
        assert next(items) == 10 * item
        for _ in range(1 if item else 3):  # this one and two ahead
            assert prepared.acquire(timeout=30)
        assert not prepared.acquire(timeout=0.2)
    assert list(items) == [10 * item for item in range(3, 9)]
    assert list(in_thread(iter([]), prepare)) == []


def test_a_thread_keeps_no_item_that_it_has_prepared() -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive = []

    def make() -> Iterator[np.ndarray]:
        for _ in range(5):
            alive.append(sum(item() is not None for item in made))
            item = np.zeros(1)
            made.append(weakref.ref(item))
            yield item
            del item

    assert len(list(in_thread(make(), np.copy))) == 5
    assert alive == [0] * 5


@pytest.mark.parametrize("failing", ["items", "prepare"])
def test_what_the_thread_raises_comes_after_the_items_before_it(failing: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise DataError("the data end here")

    def prepare(item: int) -> int:
        if item == 3:
            raise DataError("the data end here")
        return item

    source = items() if failing == "items" else iter(range(5))
    seen = []
    with pytest.raises(DataError, match="the data end here"):
        for item in in_thread(source, prepare):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_a_thread_ends_with_the_caller_that_stops_early() -> None:
    items = in_thread(iter(range(100)), lambda item: item)
    assert next(items) == 0
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "batches"]
    items.close()
    assert not thread.is_alive()


class Endless(IterableDataset[int]):
    """One item, and then a read that does not end."""

    def __iter__(self) -> Iterator[int]:
        yield 0
        time.sleep(1e6)


def test_workers_in_the_midst_of_a_read_hold_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_workers, "KILLING_SECONDS", 0.1)
    options: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": prepare_worker}
    parts = iter(DataLoader(Endless(), batch_size=None, num_workers=2, **options))
    assert [next(parts), next(parts)] == [0, 0]
    workers, began = parts._workers, time.monotonic()  # type: ignore[attr-defined]
    data_workers.end_workers(parts)
    assert time.monotonic() - began < 5  # the loader waits 10 s for each
    assert [worker.exitcode for worker in workers] == [-9, -9]
