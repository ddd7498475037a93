"""A run that diverges says so, and what it had before is kept."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
from make import write_partly_broken
from multiprocess.ends import read_status
from multiprocess.job import Job
from multiprocess.rank_runs import watch_health
from multiprocess.ranks import CountOldWeights, NotFinite
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import Manifest
from vitscale.metrics.rows import read_metrics

DIVERGE = ("optim.lr=1e30", "schedule.warmup_steps=0", "checkpoint.every_steps=2")


def test_ten_skipped_steps_in_a_row_roll_the_run_back_and_their_data_are_passed_over(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job, longer = Job(tmp_path / "job", index), Job(tmp_path / "longer", index)
    spoiled = NotFinite(rank=1, batches=range(6, 16))  # batch 5 is healthy, as is the checkpoint of step 3
    assert zygote.train(job, 2, "checkpoint.keep_every_steps=3", event=spoiled) == [0, 0], job.output()
    assert "going back to the healthy checkpoint of step 3 and passing over the 12 batches" in job.output()
    assert all(map(math.isfinite, job.column("train/loss")))
    assert "was done before" not in job.output()  # with other data
    assert [row["step"] for row in job.rows()] == list(
        range(1, 21)
    )  # each once, though 4 and 5 were done twice
    # Batches 1 to 3, and then what comes after batch 15.
    assert zygote.train(longer, 2, "total_steps=32") == [0, 0], longer.output()
    digests = longer.column("data/digest")
    assert job.column("data/digest") == [*digests[:3], *digests[15:]]
    assert job.column("train/loss")[:3] == uninterrupted.column("train/loss")[:3]
    state = Manifest.load(job.checkpoints()[20]).train
    assert (state.step, state.data_step, state.rollbacks, state.healthy) == (20, 32, 1, True)
    starts = [json.loads(line) for line in (job.run_dir / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["data_step"], row["rollbacks"]) for row in starts] == [(0, 0, 0), (3, 15, 1)]
    # A resume goes on with the data that follow.
    assert zygote.train(job, 1, "total_steps=22") == [0], job.output()
    assert zygote.train(longer, 1, "total_steps=34") == [0], longer.output()
    assert job.column("data/digest")[20:] == longer.column("data/digest")[32:]


def test_samples_of_a_roll_back_that_could_not_be_used_are_written_down(
    tmp_path: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path / "job", write_partly_broken(tmp_path))
    options = ("log.every_steps=100", "checkpoint.every_steps=4", "data.max_bad_fraction=1")
    spoiled = NotFinite(rank=1, batches=range(6, 16))
    assert zygote.train(job, 2, *options, event=spoiled) == [0, 0], job.output()
    assert "going back to the healthy checkpoint of step 4 and passing over the 11 batches" in job.output()
    replaced = Counter(row["step"] for row in read_metrics(job.run_dir / "quarantine.jsonl"))
    assert set(replaced) == {1, 4, 8, 12, 15, 16, 20}, replaced  # at each row, save and roll-back
    assert job.column("data/bad_samples") == [replaced[1], replaced.total()]
    assert Manifest.load(job.checkpoints()[20]).train.bad_samples == replaced.total()
    # A resume forgets what it does again, and keeps what is not read again.
    rows = (job.run_dir / "quarantine.jsonl").read_text()
    last = store.step_directory(store.directory_of(job.run_dir), 20)
    shutil.rmtree(last)
    assert zygote.train(job, 1, *options) == [0], job.output()
    assert Counter(rows.splitlines()) == Counter((job.run_dir / "quarantine.jsonl").read_text().splitlines())


PLAIN = [(1, "bf16"), (2, "fp32"), (3, "bf16")]  # tried always without offload, the others with it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_step_is_skipped_by_all_and_the_next_one_is_not(
    tmp_path: Path, index: Path, zygote: Zygote, precision: str, stage: int, offload: str, sweep: bool
) -> None:
    if not sweep and (offload == "true") == ((stage, precision) in PLAIN):
        pytest.skip("with --sweep: any two of stage, precision and offload are tried together always")
    job = Job(tmp_path, index)
    options = (f"precision={precision}", f"engine.zero_stage={stage}", f"engine.offload_optimizer={offload}")
    spoiled = NotFinite(rank=1, batches=range(3, 5))
    assert zygote.train(job, 2, "total_steps=8", *options, event=spoiled) == [0, 0], job.output()
    assert job.column("train/skipped_steps") == [0, 0, 1, 2, 2, 2, 2, 2]


def test_steps_that_are_skipped_now_and_then_roll_nothing_back(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job, spoiled = Job(tmp_path, index), NotFinite(rank=1, batches=range(3, 18, 2))
    assert zygote.train(job, 2, "guard.skipped_steps=2", event=spoiled) == [0, 0], job.output()
    assert job.column("train/skipped_steps")[-1] == 8 and "going back" not in job.output()


def test_the_third_time_ends_the_run(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    spoiled = CountOldWeights(NotFinite(rank=0, batches=range(5, 100)))
    assert zygote.train(job, 2, event=spoiled) == [2, 2], job.output()
    assert job.output().count("going back to the healthy checkpoint of step 3") == 2
    # A GPU has no room for two engines: on both ranks, the old one goes first.
    assert job.output().count("old weights: 0 of") == 6, job.output()
    assert job.output().count("error: ") == 1, job.output()
    assert "not finite again, after 2 roll-backs; continue from its newest healthy" in job.output()
    assert list(job.checkpoints())[:1] == [3]
    # More are allowed: it begins at the newest checkpoint, and finds the healthy one again.
    assert zygote.train(job, 2, "guard.rollbacks=3") == [0, 0], job.output()


def test_without_a_healthy_checkpoint_ten_skipped_steps_in_a_row_end_the_run(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, *DIVERGE, "log.every_steps=100") == [2, 2], job.output()
    assert [row["step"] for row in read_metrics(job.run_dir / "spikes.jsonl")] == list(range(2, 12))
    assert job.output().count("error: ") == 1, job.output()
    assert "step 11: the gradients of 10 steps in a row were not finite" in job.output()
    assert "start again in a new run_dir with a lower optim.lr" in job.output()
    status = read_status(job)
    assert (status["state"], status["step"], status["diverged"]) == ("failed", 11, True)


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


def test_evaluations_of_a_model_that_is_not_finite_are_nan_once_and_training_goes_on(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job, common = Job(tmp_path, index), f"test='{index.parent}/train-*.tar', every_steps=4"
    options = (
        *DIVERGE,
        "total_steps=8",
        f"evals.top={{{common}}}",
        f"evals.few={{kind='fewshot', shots=[1], train='{index.parent}/train-*.tar', {common}}}",
        f"evals.clusters={{kind='kmeans', {common}}}",
        "checkpoint.keep_best=eval/few/1shot",
        "expect.source=x",
        "expect.bands={'eval/top/top1'=[[0, 0, 1], [8, 0, 1]]}",
    )
    for _ in range(2):  # a resume does not repeat them
        assert zygote.train(job, 1, *options) == [2], job.output()
        assert "the run has diverged by step 8: losses or gradients" in job.mistake()
    names = ("top/top1", "top/num_samples", "few/1shot", "few/1shot_std", "clusters/nmi", "clusters/accuracy")
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    for name in names:
        values = [(row["step"], row[f"eval/{name}"]) for row in rows if f"eval/{name}" in row]
        assert [step for step, value in values if math.isfinite(value)] == [0], values
        assert [step for step, value in values if math.isnan(value)] == [4, 8], values
    assert job.output().count("step 4: evals.top: the logits of 83 of 83 images are not finite, so ") == 1
    assert job.output().count("so its results are nan") == 6
    assert "eval/top/top1: not finite since step 4" in job.output()
    assert not (job.run_dir / "checkpoints" / "best").exists()


def test_a_loss_that_is_not_finite_on_one_rank_counts_on_all(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.run(2, watch_health, job.config, tmp_path / "said", log=job.log) == [0, 0], job.output()
    for rank in range(2):
        assert json.loads((tmp_path / f"said-{rank}.json").read_text()) == [True, False, True]


def healthy(job: Job, step: int) -> bool:
    return Manifest.load(job.checkpoints()[step]).train.healthy
