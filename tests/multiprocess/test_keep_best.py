"""The best checkpoint by an evaluation is saved when found, and kept until a better one."""

from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.ranks import KillAll, KillInRetention
from multiprocess.zygote import Zygote

from vitscale.metrics.rows import read_metrics
from vitscale.metrics.writer import MetricsWriter


def section(index: Path, judge: str) -> tuple[str, ...]:
    evaluation = f"evals.test={{test='{index.parent}/train-*.tar', every_steps=2}}"
    return (evaluation, f"checkpoint.keep_best={judge}", "checkpoint.every_steps=5", "checkpoint.keep_last=1")


def best_step(job: Job, name: str) -> int:
    rows = [row for row in read_metrics(job.run_dir / "metrics.jsonl") if name in row and row["step"]]
    return max(rows, key=lambda row: row[name])["step"]  # the first of equals


@pytest.mark.parametrize("killed_at", [None, 9])
def test_the_best_step_is_kept_though_no_save_was_due(
    tmp_path: Path, index: Path, zygote: Zygote, killed_at: int | None
) -> None:
    job, options = Job(tmp_path, index), section(index, "eval/test/top1")
    if killed_at:
        assert zygote.train(job, 2, *options, event=KillAll(batch=killed_at)) == [-9, -9], job.output()
    assert zygote.train(job, 1, *options, "engine.micro_batch=8") == [0], job.output()
    best = best_step(job, "eval/test/top1")
    assert best not in (5, 10, 15, 20), "the data must make another step the best"
    assert set(job.checkpoints()) == {best, 20}
    assert (job.run_dir / "checkpoints" / "best").read_text() == f"step-{best:09d}\n"


def test_a_last_step_that_was_evaluated_before_a_kill_is_named(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """Killed between its numbers and its name: nothing is left to train or to evaluate."""
    job, best = Job(tmp_path, index), tmp_path / "run" / "checkpoints" / "best"
    options = (*section(index, "eval/test/top1"), "checkpoint.background=false", "total_steps=2")
    second = KillInRetention(time=2)  # the first is of the save itself
    assert zygote.train(job, 2, *options, "schedule.warmup_steps=1", event=second) == [-9, -9], job.output()
    assert best_step(job, "eval/test/top1") == 2 and set(job.checkpoints()) == {2} and not best.exists()
    assert zygote.train(job, 2, *options, "schedule.warmup_steps=1") == [0, 0], job.output()
    assert best.read_text() == "step-000000002\n"


def test_without_keep_best_it_is_deleted(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    first, _, *others = section(index, "eval/test/top1")
    assert zygote.train(job, 1, first, *others) == [0], job.output()
    assert set(job.checkpoints()) == {20} and not (job.run_dir / "checkpoints" / "best").exists()


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        (
            "eval/val/top1",
            'checkpoint.keep_best "eval/val/top1" names no evaluation of this run, which has test',
        ),
        ("top1", "checkpoint.keep_best 'top1' is not a number of an evaluation; write"),
        (
            "eval/test/top9",
            'keep_best "eval/test/top9" is no number of evals.test, which has eval/test/top1,',
        ),
    ],
)
def test_a_number_that_is_not_there_is_refused_before_the_first_step(
    tmp_path: Path, index: Path, zygote: Zygote, judge: str, sentence: str
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, *section(index, judge)) == [2, 2], job.output()
    assert job.output().count("error: ") == 1 and sentence in job.output(), job.output()
    assert not job.rows()


def test_the_lowest_loss_and_the_highest_of_all_else_are_best(tmp_path: Path) -> None:
    def writer(folder: str, judge: str) -> MetricsWriter:
        return MetricsWriter(tmp_path / folder, resume_step=0, total_steps=9, tensorboard=False, judge=judge)

    with writer("loss", "eval/val/loss") as metrics:
        for step, value in ((0, 0.1), (2, 0.5), (4, 0.4), (6, float("nan")), (8, 0.4)):
            metrics.write(step, {"eval/val/loss": value})
        assert metrics.best_of([2, 4, 6, 8]) == 4 and metrics.best_of([6]) is None
        assert metrics.is_best(4) and not metrics.is_best(8)  # step 0 has no checkpoint
    with writer("top1", "eval/val/top1") as metrics:
        for step, value in ((2, 0.5), (4, 0.4)):
            metrics.write(step, {"eval/val/top1": value})
        assert metrics.best_of([2, 4]) == 2 and metrics.is_best(2)
