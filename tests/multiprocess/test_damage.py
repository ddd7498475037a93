"""However a checkpoint of two ranks is damaged, it is refused by name and never used."""

import json
import shutil
from pathlib import Path

import pytest
from make import newest, steps_on_disk
from multiprocess import damage as damaging
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store
from vitscale.checkpoint.verify import alone


@pytest.fixture
def places(sweep: bool) -> int:
    """At how many random places each file is cut, and at how many a bit is flipped."""
    return 200 if sweep else 24


@pytest.fixture
def sound(tmp_path: Path, uninterrupted: Job) -> Path:
    """The last two checkpoints of a run, in a folder of their own."""
    directory = store.directory_of(uninterrupted.run_dir)
    for step in steps_on_disk(directory)[-2:]:
        shutil.copytree(store.step_directory(directory, step), tmp_path / "sound" / store.step_name(step))
    return tmp_path / "sound"


def test_damage_is_refused_by_name_and_the_checkpoint_before_is_used(
    sound: Path, tmp_path: Path, places: int, caplog
) -> None:
    older, last = (store.step_name(step) for step in steps_on_disk(sound))
    assert newest(sound).folder == str(sound / last)
    for damage in damaging.damages(sound / last, places):
        folder = damaging.damaged(damage, sound, tmp_path / "damaged")
        assert damage.problem in alone(str(folder / last)).problem, damage.name
        caplog.clear()
        checkpoint = newest(folder)
        assert checkpoint.folder == str(folder / older), damage.name
        assert f"checkpoint passed over: {folder / last}" in caplog.text, damage.name


def test_ranks_that_share_the_work_refuse_the_same_and_use_the_same(
    sound: Path, tmp_path: Path, places: int, zygote: Zygote
) -> None:
    log, result, folder = tmp_path / "log", tmp_path / "result.json", tmp_path / "damaged"
    arguments = (sound, folder, places, result)
    statuses = zygote.run(2, damaging.find_together, *arguments, log=log, timeout_seconds=600)
    assert statuses == [0, 0], log.read_text()
    older, last = steps_on_disk(sound)
    expected = [
        [damage.name, str(store.step_directory(folder, older)), [last]]
        for damage in damaging.damages(store.step_directory(sound, last), places)
    ]
    assert json.loads(result.read_text()) == expected


def test_a_stale_or_broken_name_of_the_newest_misleads_nobody(sound: Path) -> None:
    last = store.step_directory(sound, steps_on_disk(sound)[-1])
    for content in ("step-000000015", "step-000000999", "", "../.."):
        (sound / store.LATEST).write_text(content)
        assert newest(sound).folder == str(last)
