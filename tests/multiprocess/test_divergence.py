"""A run that diverges says so, and what it had before is kept."""

import json
from pathlib import Path

from multiprocess.ends import read_status
from multiprocess.job import Job
from multiprocess.ranks import watch_health
from multiprocess.zygote import Zygote

from vitscale.checkpoint.manifest import Manifest

DIVERGE = ("optim.lr=1e30", "schedule.warmup_steps=0", "checkpoint.every_steps=2")


def test_ten_skipped_steps_in_a_row_end_the_run(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, *DIVERGE) == [2, 2], job.output()
    assert job.output().count("error: ") == 1, job.output()
    assert "step 11: the gradients of 10 steps in a row were not finite" in job.output()
    assert "start again in a new run_dir with a lower optim.lr" in job.output()
    assert (read_status(job)["state"], read_status(job)["step"]) == ("failed", 11)


def test_the_newest_healthy_checkpoint_is_kept_and_named(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    few = ("total_steps=20", "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    warm = ("optim.lr=1e30", "schedule.warmup_steps=1", 'schedule.decay="constant"')
    assert zygote.train(job, 2, *few, *warm) == [2, 2], job.output()
    assert {step: healthy(job, step) for step in job.checkpoints()} == {1: True, 9: False, 10: False}
    named = f'[init] checkpoint = "{job.checkpoints()[1]}", full_state = true'
    assert named in job.output() and named in read_status(job)["reason"]


def test_the_end_of_a_run_without_a_healthy_checkpoint_is_a_failure(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    few = (*DIVERGE, "total_steps=8")
    for _ in range(2):  # and so it stays
        assert zygote.train(job, 1, *few) == [2], job.output()
        assert not healthy(job, 8) and max(job.checkpoints()) == 8
    assert job.output().count("error: the run has diverged by step 8: losses or gradients") == 2


def test_a_loss_that_is_not_finite_on_one_rank_counts_on_all(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.run(2, watch_health, job.config, tmp_path / "said", log=job.log) == [0, 0], job.output()
    for rank in range(2):
        assert json.loads((tmp_path / f"said-{rank}.json").read_text()) == [True, False, True]


def healthy(job: Job, step: int) -> bool:
    return Manifest.load(job.checkpoints()[step]).train.healthy
