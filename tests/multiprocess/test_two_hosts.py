"""Two hosts with ssh and pdsh: a host is lost in mid-step, and the run goes on without it."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from multiprocess.hosts import ROOT, Hosts, two_hosts
from multiprocess.job import Job

from vitscale import ending
from vitscale.checkpoint.manifest import Manifest

PYTHON = ROOT / ".venv" / "bin" / "python"
RUN = ("engine.zero_stage=2", "total_steps=60", "checkpoint.every_steps=5")
DEADLINE_SECONDS = 150


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts", "pdsh") as hosts:
        yield hosts


def test_a_run_outlives_a_host_and_takes_it_back(tmp_path: Path, index: Path, hosts: Hosts) -> None:
    """By one command: on both, on node1 alone after a power failure of node2, on both again."""
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    assert whole.start(1, *RUN, "engine.micro_batch=8") == [0], whole.output()
    command = multinode(hosts, job, "--min_hosts", "1", "--pause", "1")
    wait_until(job.reached(12), command, job)
    hosts.switch_off(2)
    cut = time.monotonic()
    wait_until(lambda: resumes(job) == 1, command, job)
    print(f"{time.monotonic() - cut:.1f} s from the power failure to the resume")
    wait_until(job.reached(max(job.checkpoints()) + 6), command, job)
    assert world_size(job) == 1
    hosts.switch_on(2)
    (rank,) = hosts.ranks(1)
    rank.send_signal(signal.SIGTERM)
    assert command.wait(DEADLINE_SECONDS) == 0, job.output()
    status = ending.read(job.run_dir)
    assert status and status["state"] == "done"
    assert resumes(job) == 2 and world_size(job) == 2
    assert job.column("step") == list(range(1, 61))
    assert job.column("data/digest") == whole.column("data/digest")
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), rel=1e-5)
    assert not hosts.ranks(1) and not hosts.ranks(2)


def multinode(hosts: Hosts, job: Job, *options: str) -> subprocess.Popen[bytes]:
    """launch/multinode.sh on node1, for one process on each host."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    words = ["bash", "launch/multinode.sh", hostfile, job.config, *RUN, *options]
    return hosts.start(1, words, job.log)


def resumes(job: Job) -> int:
    return job.output().count("resumed from")


def world_size(job: Job) -> int:
    """How many ranks wrote the newest checkpoint."""
    return Manifest.load(max(job.checkpoints().items())[1]).world_size


def wait_until(holds: Callable[[], object], command: subprocess.Popen[bytes], job: Job) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert command.poll() is None and time.monotonic() < deadline, job.output()
        time.sleep(0.02)
