"""SIGKILL during a save, on each rank: no run is lost, and no step is logged twice.

There is a kill before each kind of effect on each rank, with --sweep before each effect.
"""

import collections
import random
from pathlib import Path

import pytest
from make import verified
from multiprocess.job import Job
from multiprocess.ranks import Kill, Record
from multiprocess.zygote import Zygote

SEED = 0
SAVES_PER_START = 3
OPTIONS = ("checkpoint.every_steps=1", "checkpoint.keep_last=2")


def test_every_kill_during_a_save_is_survived(
    tmp_path: Path, index: Path, zygote: Zygote, sweep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = (Job(tmp_path / name, index) for name in ("whole", "killed"))
    names = effects_of_a_save(zygote, Job(tmp_path / "recorded", index))
    kills = draw_kills(names, sweep)
    options = (f"total_steps={SAVES_PER_START * len(kills) + 10}", *OPTIONS)
    survived: collections.Counter[str] = collections.Counter()
    newest = 0
    for kill in kills:
        statuses = zygote.train(killed, 2, *options, event=kill)
        assert statuses[kill.rank] == -9 and statuses[1 - kill.rank] != 0, killed.output()[-2000:]

        checkpoints = killed.checkpoints()
        for folder in checkpoints.values():
            verified(folder)
        before, newest = newest, max(checkpoints, default=0)
        assert newest - before in (kill.save, kill.save + 1), f"{kill} lost more than the save it fell into"
        survived[names[kill.rank][kill.effect]] += 1
    assert zygote.train(killed, 2, *options) == [0, 0], killed.output()[-2000:]
    assert zygote.train(whole, 2, *options, "checkpoint.every_steps=0") == [0, 0], whole.output()
    for column in ("step", "train/loss", "train/grad_norm", "data/digest"):
        assert killed.column(column) == whole.column(column)
    assert not killed.temporary_saves()
    with capsys.disabled():
        print(f"\n{len(kills)} kills (seed {SEED}) survived: before {dict(survived.most_common())}")


def effects_of_a_save(zygote: Zygote, job: Job) -> list[list[str]]:
    """The names of a save's effects on each of two ranks; it also deletes an old checkpoint."""
    record = Record(job.run_dir.parent / "effects")
    options = ("total_steps=5", "schedule.warmup_steps=1", *OPTIONS)
    assert zygote.train(job, 2, *options, event=record) == [0, 0], job.output()
    names = [record.effects(rank, save=4) for rank in range(2)]
    assert {"write", "fsync", "replace", "rename", "unlink", "rmdir"} <= set(names[0])
    # A power failure leaves what is on disk: a rank's file and its entry in the folder, then
    # the manifest, the folder's name, `latest`; only after these is an old one deleted.
    order = [[name for name in of_rank if name in ("fsync", "replace", "rename")] for of_rank in names]
    own, appears = ["fsync", "fsync"], ["fsync", "replace", "fsync"]
    assert order == [[*own, *appears, "fsync", "rename", "fsync", *appears, "rename"], own]
    return names


def draw_kills(names: list[list[str]], sweep: bool) -> list[Kill]:
    """A kill before each effect of a save on each rank; without `sweep`, one of each kind.

    It is in one of the first saves after a start. The first kill is in the run's third save:
    from then on a save deletes an old checkpoint, as the one that was recorded did.
    """
    rng = random.Random(SEED)
    places = [(rank, effect) for rank in range(2) for effect in range(len(names[rank]))]
    rng.shuffle(places)
    if not sweep:
        places = list({(rank, names[rank][effect]): (rank, effect) for rank, effect in places}.values())
    saves = [SAVES_PER_START - 1, *rng.choices(range(SAVES_PER_START), k=len(places) - 1)]
    return [Kill(rank, save, effect) for (rank, effect), save in zip(places, saves, strict=True)]
