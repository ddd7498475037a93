"""SIGKILL before every kind of thing that a save does, on each rank: no run is ever lost, nor a step of it
twice.

    bash tools/test.sh tests/multiprocess/test_kill_sweep.py --kills 300     for the night
"""

import collections
import itertools
import random
from pathlib import Path

import pytest
from multiprocess.job import CONFIG, Job
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store

SAVES_A_START = 3
OPTIONS = ("checkpoint.every_steps=1", "checkpoint.keep_last=2")


def test_every_kill_during_a_save_is_survived(
    tmp_path: Path, index: Path, zygote: Zygote, pytestconfig: pytest.Config, capsys
) -> None:
    kills = int(pytestconfig.getoption("--kills"))
    whole, killed = (Job(tmp_path / name, index) for name in ("whole", "killed"))
    steps = f"total_steps={SAVES_A_START * kills + 10}"
    log = tmp_path / "log"
    stages = stages_of_a_save(zygote, tmp_path, index)
    directory = store.directory_of(killed.run_dir)
    survived: collections.Counter[str] = collections.Counter()
    newest = 0
    for seed in range(kills):
        rng = random.Random(seed)
        # From the third save of the run on, an old checkpoint is deleted, as in the save that was recorded.
        rank, save = seed % 2, rng.randrange(SAVES_A_START) if newest else SAVES_A_START - 1
        name, effects = rng.choice(stages[rank])
        where = [killed.config, rank, save, rng.choice(effects), steps, *OPTIONS]
        statuses = zygote.run(2, "multiprocess.ranks:train_until_killed", *where, log=log)
        assert statuses[rank] == -9 and statuses[1 - rank] != 0, log.read_text()[-2000:]

        for step in store.steps_on_disk(directory):
            store.verify(store.step_directory(directory, step))
        was, newest = newest, max(store.steps_on_disk(directory), default=0)
        assert newest - was in (save, save + 1), (
            f"kill {seed} before {name} lost more than the save it fell into"
        )
        survived[name] += 1
    assert zygote.run(2, "multiprocess.ranks:train", killed.config, steps, *OPTIONS, log=log) == [0, 0]
    assert zygote.run(
        2, "multiprocess.ranks:train", whole.config, steps, "checkpoint.every_steps=0", log=log
    ) == [0, 0]
    for column in ("step", "train/loss", "train/grad_norm", "data/digest"):
        assert killed.column(column) == whole.column(column)
    assert not killed.temporary_saves()
    with capsys.disabled():
        print(f"\n{kills} kills during saves survived: before {dict(survived.most_common())}")


def stages_of_a_save(zygote: Zygote, folder: Path, index: Path) -> list[list[tuple[str, list[int]]]]:
    """For each rank: the effects of a save, in runs of equal ones, with their numbers. Of a save that also
    deletes an old checkpoint.
    """
    config = folder / "recorded.toml"
    config.write_text(CONFIG.format(run_dir=folder / "recorded", index=index))
    statuses = zygote.run(
        2,
        "multiprocess.ranks:train_recorded",
        *(config, folder / "effects", "total_steps=5", "checkpoint.every_steps=1", "schedule.warmup_steps=1"),
        log=folder / "log",
    )
    assert statuses == [0, 0], (folder / "log").read_text()
    found = []
    for rank in range(2):
        names = (folder / f"effects-{rank}").read_text().splitlines()[-1].split()
        runs = itertools.groupby(enumerate(names), key=lambda pair: pair[1])
        found.append([(name, [number for number, _ in pairs]) for name, pairs in runs])
    assert {"write", "fsync", "replace", "rename", "unlink", "rmdir"} <= {name for name, _ in found[0]}
    return found
