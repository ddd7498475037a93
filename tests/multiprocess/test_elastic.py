"""Real ranks, really killed with SIGKILL in mid-run: what comes after is what would have come anyway."""

import os
import time
from pathlib import Path

import psutil
import pytest
from multiprocess.job import Job

from vitscale.checkpoint import store

STEPS = list(range(1, 21))


def test_an_uninterrupted_run_logs_every_step_once_and_learns(uninterrupted: Job) -> None:
    assert uninterrupted.column("step") == STEPS
    losses = uninterrupted.column("train/loss")
    assert losses[0] == pytest.approx(1.6094379, abs=1e-6)
    assert min(losses) < losses[0] - 0.01
    assert uninterrupted.column("data/bad_samples") == [0] * 20


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_the_same_layout_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, index: Path, uninterrupted: Job, workers: int
) -> None:
    job = Job(tmp_path, index)
    override = f"engine.num_workers={workers}"
    assert job.start(2, override, kill_when=job.reached(8)) == [-9, -9], job.output()
    assert len(job.rows()) < 20
    assert job.start(2, override) == [0, 0], job.output()
    assert job.column("step") == STEPS
    for name in ("train/loss", "train/grad_norm", "train/lr", "data/digest"):
        assert job.column(name) == uninterrupted.column(name)
    assert same_files(last_checkpoint(job), last_checkpoint(uninterrupted))


def test_dropout_is_resumed_bit_for_bit(tmp_path: Path, index: Path) -> None:
    jobs = [Job(tmp_path / name, index) for name in ("whole", "killed")]
    assert jobs[0].start(1, "model.dropout=0.1") == [0]
    assert jobs[1].start(1, "model.dropout=0.1", kill_when=jobs[1].reached(11)) == [-9]
    assert jobs[1].start(1, "model.dropout=0.1") == [0]
    assert jobs[0].column("train/loss") == jobs[1].column("train/loss")


def test_other_world_sizes_and_zero_stages_go_on_with_the_same_data_and_losses(
    tmp_path: Path, index: Path, uninterrupted: Job
) -> None:
    """2 ranks at ZeRO 1, then 1 rank at ZeRO 3, then 2 ranks at ZeRO 2: killed twice, no conversion step."""
    job = Job(tmp_path, index)
    assert job.start(2, kill_when=job.reached(7)) == [-9, -9], job.output()
    assert job.start(1, "engine.zero_stage=3", "engine.num_workers=1", kill_when=job.reached(14)) == [-9], (
        job.output()
    )
    assert job.start(2, "engine.zero_stage=2", "engine.micro_batch=4") == [0, 0], job.output()
    assert job.column("step") == STEPS
    assert job.column("data/digest") == uninterrupted.column("data/digest")
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-5)


def test_a_kill_during_a_save_leaves_the_previous_checkpoint_in_charge(
    tmp_path: Path, index: Path, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    directory = job.run_dir / "checkpoints"
    caught = 0
    for attempt in range(6):
        before = store.steps_on_disk(directory)
        # A save is seen by its temporary folder; the delay moves the kill through its stages.
        job.start(2, kill_when=job.temporary_saves, kill_delay_seconds=0.004 * attempt)
        caught += bool(job.temporary_saves())
        after = store.steps_on_disk(directory)
        assert set(before) <= {*after} or len(after) >= 2, "a kill took a checkpoint away"
        if after:
            newest = store.newest_good(directory)
            assert newest and newest[1].step == after[-1], "a committed checkpoint does not verify"
        if after and after[-1] == 20:
            break
    assert caught, "no kill fell into a save"
    assert job.start(2) == [0, 0], job.output()
    assert job.column("step") == STEPS
    assert job.column("train/loss") == uninterrupted.column("train/loss")
    assert not job.temporary_saves()


def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(
    tmp_path: Path, index: Path, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    with job.ranks(2, "checkpoint.every_steps=0", "engine.num_workers=1") as processes:
        while not job.reached(4)():
            time.sleep(0.005)
        # One rank is told, with its data workers, as a scheduler does it; all ranks stop together.
        for process in [*psutil.Process(processes[1].pid).children(recursive=True), processes[1]]:
            process.terminate()
        assert [process.wait(60) for process in processes] == [75, 75], job.output()
    (stopped,) = store.steps_on_disk(job.run_dir / "checkpoints")
    assert 4 <= stopped < 20 and job.column("step") == list(range(1, stopped + 1))
    assert job.start(2) == [0, 0], job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_nothing_is_left_in_shared_memory(uninterrupted: Job) -> None:
    assert [name for name in os.listdir("/dev/shm") if name.startswith(("deepspeed", "torch_"))] == []


def last_checkpoint(job: Job) -> Path:
    directory = job.run_dir / "checkpoints"
    return store.step_directory(directory, store.steps_on_disk(directory)[-1])


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
