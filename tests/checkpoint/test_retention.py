"""Which checkpoints are kept, and how often a store is asked to find that out."""

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from make import manifest_of, steps_on_disk

from vitscale.checkpoint import load, store
from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.save import Saver
from vitscale.checkpoint.store import CheckpointConfig, Home
from vitscale.checkpoint.verify import open_directory
from vitscale.stores import clients, storage

RUN = "s3://runs/a"
EVERY = CheckpointConfig(keep_every_steps=10)


class CountingStore(MemoryFileSystem):
    """A store in memory, which notes the folders that it lists."""

    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    listed: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("s3://", "/"))

    def ls(self, path: str, detail: bool = True, **options) -> list:
        self.listed.append(path)
        return super().ls(path, detail=detail, **options)

    def find(self, path: str, *args, **options):
        """One listing in every version of fsspec: the folder that a removal reads."""
        before = len(self.listed)
        found = super().find(path, *args, **options)
        self.listed[before:] = [path]
        return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run's checkpoints in a CountingStore, which is empty."""
    monkeypatch.setitem(_registry, "s3", CountingStore)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("listed", [])):
        monkeypatch.setattr(CountingStore, name, value)
    clients.client.cache_clear()
    yield Home(tmp_path / "node", store.child_of_run(RUN))
    clients.client.cache_clear()


def put(home: Home, *steps: int, finished: bool = True) -> None:
    """Let checkpoints be in the store, or what killed saves leave."""
    for step in steps:
        folder = store.step_folder(home.store, step)
        storage.write_bytes(f"{folder}/rank-00000.safetensors", b"")
        if finished:
            manifest = manifest_of(step, {"world_size": 1, "files": {}, "tensors": {}})
            storage.write_bytes(f"{folder}/{MANIFEST}", manifest.to_bytes())


def listings(action: Callable[[], object]) -> list[str]:
    """The folders that an action lists."""
    CountingStore.listed.clear()
    action()
    return list(CountingStore.listed)


def test_a_save_lists_as_few_folders_however_many_checkpoints_are_kept(home: Home) -> None:
    saver, counts = Saver(home, EVERY), []
    for num_kept in (5, 25):
        put(home, *range(10, 10 * num_kept, 10))
        saver.retain()
        put(home, 10 * num_kept)
        listed = listings(saver.retain)
        assert max(collections.Counter(listed).values()) == 1
        counts.append(len(listed))
    assert counts == [5, 5], "that of the steps, the last three, and the one that is removed"
    assert len(steps_on_disk(home.store)) == 25


def test_a_start_lists_as_few_folders_however_many_checkpoints_are_kept(home: Home) -> None:
    counts = []
    for num_kept in (5, 25):
        put(home, *range(10, 10 * num_kept + 1, 10))
        put(home, 999, finished=False)
        counts.append([len(listings(home.newest)), len(listings(lambda: load.find(home)))])
        counts[-1].append(len(listings(lambda: open_directory(RUN))))
        counts[-1].append(len(listings(Saver(home, EVERY).newest_healthy)))
        counts[-1].append(len(listings(Saver(home, EVERY).retain)))
        found = load.find(home)
        assert found and found.manifest.step == 10 * num_kept
    # That of the steps, the unfinished one and the newest; the run's; two more to keep, and the
    # one that is removed.
    assert counts == [[3, 3, 4, 3, 6]] * 2


@pytest.mark.parametrize(
    ("config", "finished", "unfinished", "scores", "left"),
    [
        (CheckpointConfig(keep_last=2), [10, 20, 30], [], {}, [20, 30]),
        (CheckpointConfig(keep_last=2), [10, 20, 30], [25, 40], {}, [20, 30, 40]),
        (CheckpointConfig(keep_last=1), [10, 20, 30], [5, 25], {10: 0.5}, [10, 30]),
        (CheckpointConfig(keep_last=1), [10, 20, 30], [25], {25: 0.5}, [30]),
        (CheckpointConfig(keep_last=1), [10, 20, 30], [25], {25: 0.5, 10: 0.4, 20: 0.3}, [10, 30]),
        (CheckpointConfig(keep_last=1), [], [10], {}, [10]),
        (
            CheckpointConfig(keep_last=1, keep_every_steps=20),
            [10, 20, 30, 40, 50],
            [15],
            {10: 0.5},
            [10, 20, 40, 50],
        ),
    ],
)
def test_of_what_is_in_a_store_only_finished_checkpoints_count(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    config: CheckpointConfig,
    finished: list[int],
    unfinished: list[int],
    scores: dict[int, float],
    left: list[int],
) -> None:
    monkeypatch.setattr(store, "ABANDONED_SECONDS", -60.0)
    put(home, *finished)
    put(home, *unfinished, finished=False)
    storage.write_bytes(f"{home.store}/step-5/file", b"")

    def best_of(steps: Sequence[int]) -> int | None:
        return max(scores.keys() & set(steps), key=lambda step: scores[step], default=None)

    Saver(home, config, best_of=best_of).retain()
    names = storage.names_in(home.store)
    assert [name for name in names if name != store.BEST] == [*map(store.step_name, left), "step-5"]
    if best := best_of(finished):
        named = storage.read_bytes(storage.child(home.store, store.BEST)).decode().strip()
        assert named == store.step_name(best)
    else:
        assert store.BEST not in names


def test_retention_leaves_the_newest_of_those_that_another_job_does_not_delete(home: Home) -> None:
    """The other one is killed between the manifest and the rest."""
    put(home, 10, 20, 30)
    storage.delete(f"{store.step_folder(home.store, 30)}/{MANIFEST}")
    store.apply_retention(home, CheckpointConfig(keep_last=1), (), lambda folder: True)
    assert steps_on_disk(home.store) == [20]


@pytest.mark.parametrize(
    ("steps", "keep_last", "every", "unhealthy", "best", "kept"),
    [
        ([10, 20, 30, 40], 2, 0, [], None, {30, 40}),
        ([10, 20, 30, 40], 1, 20, [], None, {20, 40}),
        ([10], 3, 0, [], None, {10}),
        ([5, 10, 15, 20, 25], 1, 10, [], None, {10, 20, 25}),
        ([10, 20, 30, 40], 2, 0, [40], None, {30, 40}),
        ([10, 20, 30, 40], 2, 0, [40, 30], None, {20, 30, 40}),
        ([10, 20, 30], 1, 0, [30, 20, 10], None, {30}),
        ([10, 20, 30], 1, 0, [], 10, {10, 30}),
        ([10, 20, 30], 1, 0, [], 15, {30}),
    ],
)
def test_retention_keeps_the_last_the_newest_healthy_the_best_and_every_nth(
    steps: list[int], keep_last: int, every: int, unhealthy: list[int], best: int | None, kept: set[int]
) -> None:
    found = store.retained(
        steps, keep_last, every, lambda step: True, lambda step: step not in unhealthy, best
    )
    assert found == kept
