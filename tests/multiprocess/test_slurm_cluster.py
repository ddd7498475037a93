"""launch/slurm.sbatch on a real Slurm of two nodes: a run goes on until it is done."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from multiprocess.hosts import ROOT
from multiprocess.job import Job, wait_until
from multiprocess.slurm import Slurm, two_node_slurm

from vitscale.guard import ending

NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
PYTHON = ROOT / ".venv" / "bin" / "python"
RUN = ("total_steps=60", "checkpoint.every_steps=50", "optim.lr=1e-4")
LONG = ("total_steps=1000000", "checkpoint.every_steps=0")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path) as slurm:
        yield slurm


def test_srun_starts_the_same_run_on_two_nodes(
    tmp_path: Path, index: Path, slurm: Slurm, uninterrupted: Job
) -> None:
    job = Job(tmp_path / "job", index)
    said = slurm.command("srun", "--nodes=2", "--ntasks=2", PYTHON, "launch/train.py", job.config)
    assert job.rows(), said
    assert job.column("data/digest") == uninterrupted.column("data/digest")
    # A rank that is alone on its node has all cores, and other sums of floats.
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), rel=1e-6)


def test_a_job_that_is_preempted_saves_is_requeued_and_goes_on(
    tmp_path: Path, index: Path, slurm: Slurm, sweep: bool
) -> None:
    if not sweep:
        pytest.skip("with --sweep: it starts a job of two nodes twice")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    assert whole.start(1, *RUN, "engine.micro_batch=8") == [0], whole.output()
    number = submit(slurm, job, *RUN)
    wait_until(job.reached(8), job.output)
    urgent = slurm.submit("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 0.1")
    began = time.monotonic()
    wait_until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", job.output)
    print(f"{time.monotonic() - began:.1f} s until the urgent job was done")
    wait_until(lambda: slurm.job(number)["JobState"] == "PENDING", job.output)
    status = ending.read(job.run_dir)
    assert status and status["state"] == "preempted" and status["reason"].startswith("SIGTERM")
    assert list(job.checkpoints()) == [status["step"]] and status["step"] < 50
    slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now")  # it would wait two minutes
    wait_until(lambda: slurm.job(number)["JobState"] == "COMPLETED", job.output)
    assert slurm.job(number)["Restarts"] == "1"
    assert job.output().count("resumed from") == 1, job.output()
    assert job.column("step") == list(range(1, 61))
    assert job.column("data/digest") == whole.column("data/digest")
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), rel=1e-6)


def test_a_job_saves_before_its_time_is_over_and_is_not_requeued_if_it_is_cancelled(
    tmp_path: Path, index: Path, slurm: Slurm, sweep: bool
) -> None:
    if not sweep:
        pytest.skip("with --sweep: the shortest time limit is a minute")
    job = Job(tmp_path / "job", index)
    # Slurm looks at times twice a minute, so the signal may come up to 60 seconds early.
    number = submit(slurm, job, *LONG, options=("--time=3", "--signal=USR1@60"))
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", job.output)
    status = ending.read(job.run_dir)
    assert status and status["state"] == "preempted" and status["reason"].startswith("SIGUSR1")
    assert max(job.checkpoints()) == status["step"]
    slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now", "TimeLimit=30")
    wait_until(lambda: "resumed from" in job.output(), job.output)
    wait_until(job.reached(status["step"] + 5), job.output)
    slurm.command("scancel", number)
    wait_until(lambda: slurm.job(number)["JobState"] == "CANCELLED", job.output)
    status = ending.read(job.run_dir)
    assert status and status["state"] == "preempted"
    time.sleep(5)
    assert slurm.job(number)["JobState"] == "CANCELLED"


def submit(slurm: Slurm, job: Job, *overrides: str, options: tuple[str, ...] = ("--time=10",)) -> str:
    """The number of the job that launch/slurm.sbatch runs, one task a node."""
    return slurm.submit(
        *NODES, *options, f"--output={job.log}", "launch/slurm.sbatch", job.config, *overrides
    )
