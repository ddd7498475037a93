"""A run that is asked to stop does so wherever it is, and what was broken off is done later."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from multiprocess.ends import data_worker_of, read_status
from multiprocess.job import TIMEOUT_SECONDS, Job, wait_until
from multiprocess.ranks import KillAll, KillInEvaluation, Stop, StopInEvaluation
from multiprocess.zygote import Zygote
from weights.foreign_models import saved_model

from vitscale.metrics.goodput import read_starts
from vitscale.metrics.rows import read_metrics
from vitscale.models.vit_config import ViTConfig


def evaluations(job: Job) -> list[tuple[int, float]]:
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    return [(row["step"], row["eval/test/top1"]) for row in rows if "eval/test/top1" in row]


def test_an_evaluation_is_broken_off_and_done_at_the_next_start(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job, whole = Job(tmp_path / "job", index), Job(tmp_path / "whole", index)
    # 83 samples: 11 batches of 4 on each of two ranks, at steps 0, 5, 10, 15 and 20.
    section = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=4, every_steps=5}}"
    assert zygote.train(whole, 2, section) == [0, 0], whole.output()
    in_second = StopInEvaluation(rank=1, batch=14)
    assert zygote.train(job, 2, section, event=in_second) == [75, 75], job.output()
    assert max(job.checkpoints()) == 5 and [step for step, _ in evaluations(job)] == [0]
    assert (read_status(job)["state"], read_status(job)["reason"]) == ("preempted", "SIGTERM (rank 1)")
    line = (
        f"stopped by SIGTERM (rank 1) at step {read_status(job)['step']}, saved; the same command continues"
    )
    assert job.output().count(line) == 1
    assert zygote.train(job, 2, section) == [0, 0], job.output()
    assert "stopped by" not in job.output().split(line)[1]
    assert evaluations(job) == evaluations(whole) and len(evaluations(job)) == 5
    assert job.column("train/loss") == whole.column("train/loss")


def test_a_step_is_saved_before_it_is_evaluated(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    """Killed in the second evaluation, of step 5: no step is lost, and the best is kept."""
    job = Job(tmp_path, index)
    evaluation = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=4, every_steps=5}}"
    saves = ("checkpoint.every_steps=5", "checkpoint.keep_best=eval/test/top1", "checkpoint.keep_last=1")
    section = (evaluation, *saves, "checkpoint.background=false")
    event = KillInEvaluation(batch=14)
    assert zygote.train(job, 2, *section, event=event) == [-9, -9], job.output()
    assert list(job.checkpoints()) == [5] and [step for step, _ in evaluations(job)] == [0]
    assert zygote.train(job, 2, *section) == [0, 0], job.output()
    assert [step for step, _ in evaluations(job)] == [0, 5, 10, 15, 20]
    best = max(evaluations(job)[1:], key=lambda pair: pair[1])[0]  # the first of equals
    assert set(job.checkpoints()) == {best, 20}
    assert (job.run_dir / "checkpoints" / "best").read_text() == f"step-{best:09d}\n"
    history = [json.loads(line) for line in (job.run_dir / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [0, 5]
    start = read_starts(job.run_dir / "time.json")[-1]  # evaluated after its last save, and not lost
    assert start.marks[-1].seconds["evaluate"] == start.seconds["evaluate"]


def test_an_evaluation_that_is_due_at_a_stop_is_left_to_the_next_start(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    section = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=100, every_steps=1}}"
    assert zygote.train(job, 2, section, event=Stop(batch=4)) == [75, 75], job.output()
    step = max(job.checkpoints())
    assert [at for at, _ in evaluations(job)] == list(range(step)) and 4 <= step < 20
    assert zygote.train(job, 2, section) == [0, 0], job.output()
    assert [at for at, _ in evaluations(job)] == list(range(21))


def test_the_first_evaluation_can_be_stopped_before_any_step(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    section = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=4}}"
    assert zygote.train(job, 2, section, event=StopInEvaluation(rank=0, batch=2)) == [75, 75], job.output()
    assert not job.checkpoints() and not job.rows() and read_status(job)["step"] == 0
    assert "stopped by SIGTERM (rank 0) at step 0; the same command continues" in job.output()
    # No step was made, so that another config may take its place.
    assert zygote.train(job, 2, section, "optim.lr=0.002") == [0, 0], job.output()
    assert [step for step, _ in evaluations(job)] == [0, 20]


def test_a_run_is_not_done_before_its_last_evaluation(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    section = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=4}}"
    in_last = StopInEvaluation(rank=1, batch=14)  # of 11 before the first step, and 11 after the last
    assert zygote.train(job, 2, section, event=in_last) == [75, 75], job.output()
    assert (read_status(job)["state"], read_status(job)["step"]) == ("preempted", 20)
    assert max(job.checkpoints()) == 20 and [step for step, _ in evaluations(job)] == [0]
    for _ in range(2):  # once it is done, it stays so
        assert zygote.train(job, 2, section) == [0, 0], job.output()
        assert read_status(job)["state"] == "done" and [step for step, _ in evaluations(job)] == [0, 20]


def test_a_file_stops_the_run_once(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, event=Stop(batch=4)) == [75, 75], job.output()
    (job.run_dir / "stop").touch()  # before a start: it stops after a step or two
    assert zygote.train(job, 2, "total_steps=100000") == [75, 75], job.output()
    status = read_status(job)
    assert (status["state"], status["reason"]) == ("stopped", f"the file {job.run_dir}/stop")
    assert not (job.run_dir / "stop").exists() and max(job.checkpoints()) > 5
    assert max(job.checkpoints()) == job.rows()[-1]["step"]


MASKED = ("model.num_classes=0", "model.representation_size=0", "model.num_patch_outputs=512")


TEACHER = ViTConfig(variant="Ti/4", width=16, depth=1, num_heads=2, mlp_dim=16, image_size=8, num_classes=5)
DISTILLED = ("objective.teacher={folder}/teacher", "model.distilled=true", "model.representation_size=0")


@pytest.mark.parametrize(
    "options",
    [(), ("objective.kind=masked_patches", *MASKED), ("objective.kind=distillation", *DISTILLED)],
)
def test_a_rank_without_data_stops_when_another_one_is_asked(
    tmp_path: Path, index: Path, zygote: Zygote, options: tuple[str, ...], sweep: bool
) -> None:
    if not sweep and "objective.kind=distillation" not in options:
        pytest.skip("with --sweep: the objective with most inputs is tried always")
    job, whole = Job(tmp_path / "job", index), Job(tmp_path / "whole", index)
    saved_model(tmp_path / "teacher", TEACHER)
    endless = (*(option.format(folder=tmp_path) for option in options), "total_steps=100000")
    with job.ranks(2, "engine.num_workers=1", *endless) as ranks:
        wait_until(lambda: len(job.rows()) > 7, job.output, *ranks)
        data_worker_of(psutil.Process(ranks[1].pid)).suspend()
        step = last_step(job)
        while (now := last_step(job)) != step:  # what was read ahead is used up
            step = now
        ranks[0].send_signal(signal.SIGTERM)
        assert [rank.wait(TIMEOUT_SECONDS) for rank in ranks] == [75, 75], job.output()
    # The last step that all have made is saved. The one after it has left no trace.
    step = job.rows()[-1]["step"]
    assert max(job.checkpoints()) == step and "rank 0" in read_status(job)["reason"]
    assert zygote.train(job, 2, *endless, event=KillAll(batch=5)) == [-9, -9]
    assert zygote.train(whole, 2, *endless, event=KillAll(batch=step + 5)) == [-9, -9]
    common = min(len(job.rows()), len(whole.rows()))
    assert common > step + 1
    for name in ("step", "train/loss", "train/skipped_steps", "data/digest"):
        assert job.column(name)[:common] == whole.column(name)[:common]


def last_step(job: Job) -> int:
    time.sleep(2)
    return job.rows()[-1]["step"]
