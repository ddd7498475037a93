"""Runs in fp16 on ranks of a CPU: losses, skipped steps and the loss scale, also resumed."""

from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.ranks import HasFp16, KillAll, NotFinite
from multiprocess.zygote import Zygote

from vitscale.checkpoint.manifest import Manifest

FP16 = "precision=fp16"
# The scale is halved from the second step that overflows on, and doubled after 6 others.
WINDOW = "engine.deepspeed_extra={fp16={loss_scale_window=6}}"
OVERFLOWS = NotFinite(rank=0, batches=range(3, 6))
EVERY_STEP = "checkpoint.every_steps=1"
THREE = ("data.lanes=6", "global_batch=6", "engine.micro_batch=1")  # what 1, 2 and 3 ranks can share


def layout(stage: int) -> tuple[str, ...]:
    return (FP16, WINDOW, *THREE, f"engine.zero_stage={stage}")


def skipped(job: Job) -> list[float]:
    return job.column("train/skipped_steps")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, index: Path, zygote: Zygote) -> Job:
    """20 steps on 2 ranks, of which 3 to 5 overflow."""
    job = Job(tmp_path_factory.mktemp("fp16"), index)
    keep = (EVERY_STEP, "checkpoint.keep_last=20")
    assert zygote.train(job, 2, *layout(1), *keep, event=HasFp16((OVERFLOWS,))) == [0, 0], job.output()
    return job


def test_overflows_skip_steps_and_the_scale_falls_and_rises(whole: Job) -> None:
    assert skipped(whole) == [0, 0, 1, 2, 3, *[3] * 15]
    scales = {step: Manifest.load(at).loss_scaler["cur_scale"] for step, at in whole.checkpoints().items()}
    powers = [*[16] * 3, 15, *[14] * 7, *[15] * 6, *[16] * 3]
    assert scales == {step: 2.0**power for step, power in enumerate(powers, 1)}


def test_an_overflow_that_lasts_ends_in_a_divergence(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    lasting = HasFp16((NotFinite(rank=0, batches=range(1, 200)),))
    long = "total_steps=100"  # the scale falls from 2^16 to 1 before they count
    assert zygote.train(job, 1, FP16, long, event=lasting) == [2], job.output()
    assert "error: the run has diverged by step " in job.output(), job.output()
    assert "not finite again, after 2 roll-backs" in job.output() and "Traceback" not in job.output()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_follows_fp32(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, stage: int
) -> None:
    job = Job(tmp_path, index)
    options = (FP16, f"engine.zero_stage={stage}")
    assert zygote.train(job, 2, *options, event=HasFp16()) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-3)
    assert job.column("train/loss") != uninterrupted.column("train/loss")


def test_a_run_in_fp16_is_killed_and_goes_on_in_any_layout(
    tmp_path: Path, index: Path, zygote: Zygote, whole: Job
) -> None:
    job = Job(tmp_path, index)
    starts = [(2, 1, (OVERFLOWS, KillAll(batch=8)))]
    starts += [(world_size, stage, (KillAll(batch=4),)) for world_size, stage in ((1, 2), (3, 3), (2, 2))]
    for world_size, stage, events in starts:
        statuses = zygote.train(job, world_size, *layout(stage), EVERY_STEP, event=HasFp16(events))
        assert statuses == [-9] * world_size, job.output()
    assert zygote.train(job, 1, *layout(3), EVERY_STEP, event=HasFp16()) == [0], job.output()
    assert skipped(job) == skipped(whole)
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), abs=5e-4)
    ended, expected = (Manifest.load(run.checkpoints()[20]) for run in (job, whole))
    assert (ended.loss_scaler, ended.counters) == (expected.loss_scaler, expected.counters)


@pytest.mark.parametrize("stage", [1, 3])
def test_on_one_layout_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, whole: Job, stage: int
) -> None:
    ended, killed = whole, Job(tmp_path / "killed", index)
    if stage == 3:
        ended = Job(tmp_path / "ended", index)
        assert zygote.train(ended, 2, *layout(3), event=HasFp16((OVERFLOWS,))) == [0, 0], ended.output()
    events = HasFp16((OVERFLOWS, KillAll(batch=9)))
    assert zygote.train(killed, 2, *layout(stage), event=events) == [-9, -9], killed.output()
    assert zygote.train(killed, 2, *layout(stage), event=HasFp16()) == [0, 0], killed.output()
    assert killed.column("train/loss") == ended.column("train/loss")
