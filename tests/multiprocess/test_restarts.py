"""torchrun starts ranks again after deaths, and when machines come and go; the run goes on."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from multiprocess.ends import launched, ranks_of, read_status
from multiprocess.job import PROGRAM, TIMEOUT_SECONDS, Job, wait_until
from multiprocess.zygote import Zygote

from vitscale.checkpoint.manifest import Manifest
from vitscale.rendezvous import free_port

LONG = ("total_steps=120", "engine.num_workers=1", "checkpoint.every_steps=10")
KILLS = ((85, 0), (25, 1))  # step, rank


def test_ranks_that_died_are_started_again_and_resume(
    tmp_path: Path, index: Path, zygote: Zygote, sweep: bool
) -> None:
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "killed", index)
    assert zygote.train(whole, 2, *LONG) == [0, 0], whole.output()
    kills = sorted(KILLS if sweep else KILLS[:1])
    with launched(job, "torchrun", "--max-restarts", "2", overrides=LONG) as agent:
        for step, rank in kills:
            wait_until(job.reached(step), job.output, agent)
            ranks_of(psutil.Process(agent.pid).children())[rank].kill()
        assert agent.wait(TIMEOUT_SECONDS) == 0, job.output()
    assert read_status(job)["state"] == "done"
    assert job.output().count("resumed from") == len(kills)
    assert job.column("step") == list(range(1, 121))
    for name in ("data/digest", "train/loss"):
        assert job.column(name) == whole.column(name)


def test_machines_come_and_go(tmp_path: Path, index: Path, zygote: Zygote, sweep: bool) -> None:
    """Two agents are two machines: one begins, another joins, and then dies with its rank."""
    if not sweep:
        pytest.skip("with --sweep: a host of two is lost and comes back in test_two_hosts.py")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "elastic", index)
    length = "total_steps=250"
    assert zygote.train(whole, 1, length, "engine.micro_batch=8") == [0], whole.output()
    # slow enough for a machine to join in mid-run
    steps = (length, "checkpoint.every_steps=10", "engine.micro_batch=1")
    endpoint = f"127.0.0.1:{free_port()}"
    first = start_agent(job, endpoint, *steps)
    second = None
    try:
        wait_until(job.reached(20), job.output, first)
        second = start_agent(job, endpoint, *steps)
        wait_until(lambda: world_size(job) == 2, job.output, first)
        joined = job.rows()[-1]["step"]
        wait_until(job.reached(joined + 20), job.output, first)
        machine = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
        for process in machine:
            process.kill()
        assert first.wait(180) == 0, job.output()
    finally:
        for agent in (first, second):
            if agent:
                for process in (
                    psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else ()
                ):
                    process.kill()
                agent.kill()
                agent.wait()
    assert world_size(job) == 1
    assert read_status(job)["state"] == "done"
    assert job.column("data/digest") == whole.column("data/digest")


def start_agent(job: Job, endpoint: str, *overrides: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"),
        *("--max-restarts", "5", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "job"),
        *("--rdzv_conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"),
        *(str(PROGRAM), str(job.config), *overrides),
    ]
    # Without it, an agent that joins waits for ever in torch 2.13, before it has a rank.
    elastic = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **elastic, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with open(job.log, "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def world_size(job: Job) -> int:
    """How many ranks wrote the newest checkpoint."""
    return Manifest.load(max(job.checkpoints().items())[1]).world_size
