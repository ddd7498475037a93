"""A table of ways to damage a checkpoint of two ranks, and ranks that go through it.

It tests how the newest good checkpoint is found: by one process (tools, evaluation), or by the
ranks of a run together, each hashing its share of the files.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from make import steps_on_disk

from vitscale import distributed
from vitscale.checkpoint import load, store
from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.store import Home


class Damage(NamedTuple):
    """apply(older, newest) damages the newest checkpoint; it is then refused for `problem`."""

    name: str
    problem: str
    apply: Callable[[Path, Path], object]


def damages(newest: Path, places: int) -> list[Damage]:
    """The table for the files of `newest`, each also cut and flipped at random `places`."""
    table = [
        Damage("two ranks swapped", "rank-00000", _swap_ranks),
        Damage("a file lost", "rank-00001.safetensors is missing", _lose("rank-00001.safetensors")),
        Damage("the manifest lost", f"holds no {MANIFEST}", _lose(MANIFEST)),
        Damage("everything lost", f"holds no {MANIFEST}", _lose("*")),
        Damage("a file of another step", "rank-00001", _take_from_older("rank-00001.safetensors")),
        Damage("the manifest of another step", "holds the manifest.json of step", _take_from_older(MANIFEST)),
    ]
    for path in sorted(newest.iterdir()):
        rng, size = random.Random(path.name), path.stat().st_size
        for length in [0, 1, 7, size - 1, *rng.sample(range(size), places)]:
            table.append(Damage(f"{path.name} cut to {length}", path.name, _cut(path.name, length)))
        for position in [0, size - 1, *rng.sample(range(size), places)]:
            bit = rng.randrange(8)
            name = f"{path.name} flipped at {position}.{bit}"
            table.append(Damage(name, path.name, _flip(path.name, position, bit)))
    return table


def damaged(damage: Damage, sound: Path, folder: Path) -> Path:
    """A fresh copy of the two checkpoints in `sound` below `folder`, the newest one damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    older, newest = (store.step_directory(folder, step) for step in steps_on_disk(folder))
    damage.apply(older, newest)
    return folder


def find_together(sound: Path, folder: Path, places: int, result: Path) -> None:
    """Go through the table on all ranks; note each name, folder used, and steps passed over."""
    distributed.initialize()
    results = []
    for damage in _table(sound, places):
        if distributed.is_main():
            damaged(damage, sound, folder)
        distributed.barrier()
        checkpoint = load.find(Home(folder))
        assert checkpoint, damage.name
        results.append([damage.name, checkpoint.folder, list(map(store.step_of, checkpoint.passed_over))])
        assert distributed.gather_json(results[-1]) == [results[-1]] * distributed.world_size()
    if distributed.is_main():
        result.write_text(json.dumps(results))


def _table(sound: Path, places: int) -> Iterator[Damage]:
    yield from damages(store.step_directory(sound, steps_on_disk(sound)[-1]), places)


def _swap_ranks(_: Path, newest: Path) -> None:
    one, other = sorted(newest.glob("rank-*"))
    one.rename(newest / "kept")
    other.rename(one)
    (newest / "kept").rename(other)


def _lose(pattern: str) -> Callable[[Path, Path], object]:
    return lambda _, newest: [path.unlink() for path in newest.glob(pattern)]


def _take_from_older(name: str) -> Callable[[Path, Path], object]:
    return lambda older, newest: shutil.copy(older / name, newest)


def _cut(name: str, length: int) -> Callable[[Path, Path], object]:
    return lambda _, newest: (newest / name).write_bytes((newest / name).read_bytes()[:length])


def _flip(name: str, position: int, bit: int) -> Callable[[Path, Path], object]:
    def flip(_: Path, newest: Path) -> None:
        data = bytearray((newest / name).read_bytes())
        data[position] ^= 1 << bit
        (newest / name).write_bytes(data)

    return flip
