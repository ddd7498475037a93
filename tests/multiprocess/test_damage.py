"""Every way in which a checkpoint that two ranks wrote can be damaged: refused by name, and never used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from multiprocess.job import Job

from vitscale.checkpoint import store
from vitscale.checkpoint.format import MANIFEST, CheckpointError

PLACES = 24  # in each file
Damage = Callable[[Path], None]


@pytest.fixture
def run(tmp_path: Path, uninterrupted: Job) -> tuple[Path, Path]:
    """The last two checkpoints of a run, in a folder of their own."""
    directory = store.directory_of(uninterrupted.run_dir)
    for step in store.steps_on_disk(directory)[-2:]:
        shutil.copytree(store.step_directory(directory, step), tmp_path / store.step_name(step))
    older, newest = (tmp_path / store.step_name(step) for step in store.steps_on_disk(tmp_path))
    return older, newest


def check_refused(run: tuple[Path, Path], file: str, caplog) -> None:
    """The newest checkpoint is refused, naming `file`, and the one before is used."""
    older, newest = run
    with pytest.raises(CheckpointError, match=file):
        store.verify(newest)
    caplog.clear()
    found = store.newest_good(newest.parent)
    assert found and found[0] == older
    assert f"checkpoint passed over: {newest}" in caplog.text and file in caplog.text


def test_a_file_cut_anywhere_is_refused(run: tuple[Path, Path], caplog) -> None:
    _, newest = run
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        for length in [0, 1, 7, len(data) - 1, *random.Random(1).sample(range(len(data)), PLACES)]:
            path.write_bytes(data[:length])
            check_refused(run, path.name, caplog)
        path.write_bytes(data)
    assert store.newest_good(newest.parent)[0] == newest


def test_one_flipped_bit_anywhere_is_refused(run: tuple[Path, Path], caplog) -> None:
    _, newest = run
    rng = random.Random(2)
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        for position in [0, len(data) - 1, *rng.sample(range(len(data)), PLACES)]:
            flipped = bytearray(data)
            flipped[position] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            check_refused(run, path.name, caplog)
        path.write_bytes(data)
    assert store.newest_good(newest.parent)[0] == newest


def swap_ranks(run: tuple[Path, Path]) -> str:
    one, other = sorted(run[1].glob("rank-*"))
    one.rename(run[1] / "kept")
    other.rename(one)
    (run[1] / "kept").rename(other)
    return "rank-00000"


def lose_a_file(run: tuple[Path, Path]) -> str:
    (run[1] / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors is missing"


def take_a_file_from_another_step(run: tuple[Path, Path]) -> str:
    shutil.copy(run[0] / "rank-00001.safetensors", run[1])
    return "rank-00001"


def take_the_manifest_from_another_step(run: tuple[Path, Path]) -> str:
    shutil.copy(run[0] / MANIFEST, run[1])
    return "rank-00000"


def lose_the_manifest(run: tuple[Path, Path]) -> str:
    (run[1] / MANIFEST).unlink()
    return f"holds no {MANIFEST}"


def lose_everything(run: tuple[Path, Path]) -> str:
    for path in run[1].iterdir():
        path.unlink()
    return f"holds no {MANIFEST}"


@pytest.mark.parametrize(
    "damage",
    [
        swap_ranks,
        lose_a_file,
        take_a_file_from_another_step,
        take_the_manifest_from_another_step,
        lose_the_manifest,
        lose_everything,
    ],
)
def test_files_of_others_or_none_are_refused(run: tuple[Path, Path], damage, caplog) -> None:
    check_refused(run, damage(run), caplog)


def test_a_stale_or_broken_name_of_the_newest_misleads_nobody(run: tuple[Path, Path]) -> None:
    older, newest = run
    for content in (older.name, "step-000000999", "", "../.."):
        (newest.parent / store.LATEST).write_text(content)
        assert store.newest_good(newest.parent)[0] == newest
