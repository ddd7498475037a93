"""Two hosts with ssh and pdsh: a host is lost in mid-step, and the run goes on without it."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from multiprocess.hosts import ROOT, Hosts, send, two_hosts
from multiprocess.job import TIMEOUT_SECONDS, Job, wait_until
from multiprocess.zygote import Zygote

from vitscale.checkpoint.manifest import Manifest
from vitscale.guard import ending

PYTHON = ROOT / ".venv" / "bin" / "python"
# At a higher rate, the rounding of other layouts grows tenfold every few steps.
COMMON = ("engine.zero_stage=2", "checkpoint.every_steps=5", "optim.lr=1e-4")
RUN = (*COMMON, "total_steps=60")
# What shells, pdsh and deepspeed read something into.
SECRET = "a%b+c/d$HOME`date`e\"f'g h\\"
ODD = "it's 100%n of $a (run)"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts", "pdsh") as hosts:
        yield hosts


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "hosts"
    with two_hosts(folder) as hosts:
        sleepers = [hosts.start(number, ["sleep", "1000"], tmp_path / "log") for number in (1, 2)]
        for number in (1, 2):
            wait_until(lambda number=number: len(hosts.processes(number)) > 1, lambda: "", sleepers[0])
        inside = [*hosts.processes(1), *hosts.processes(2)]
        assert hosts.run(1, "ssh", "node2", "hostname").stdout == "node2\n"
    assert not any(process.is_running() for process in inside)
    assert [sleeper.wait(5) for sleeper in sleepers]
    assert str(folder) not in Path("/proc/mounts").read_text()
    links = Path("/sys/class/net")
    assert not {"switch", "port1", "port2"} & {path.name for path in links.iterdir()}


def test_a_run_outlives_a_host_and_takes_it_back(
    tmp_path: Path, index: Path, hosts: Hosts, zygote: Zygote
) -> None:
    """By one command: on both, on node1 alone after a power failure of node2, on both again."""
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    assert zygote.train(whole, 1, *RUN, "engine.micro_batch=8") == [0], whole.output()
    job.run_dir = tmp_path / ODD
    command = multinode(hosts, job, f"run_dir={job.run_dir}", "--min-hosts", "1", "--pause", "1")
    wait_until(job.reached(12), job.output, command)
    (rank,) = hosts.ranks(2)
    assert rank.environ()["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert SECRET not in job.output() and "AWS_" not in job.output()
    hosts.switch_off(2)
    cut = time.monotonic()
    wait_until(lambda: resumes(job) == 1, job.output, command)
    print(f"{time.monotonic() - cut:.1f} s from the power failure to the resume")
    wait_until(job.reached(max(job.checkpoints()) + 6), job.output, command)
    assert world_size(job) == 1
    hosts.switch_on(2)
    # It is back before its file systems are.
    assert hosts.run(2, "mount", "-t", "tmpfs", "tmpfs", ROOT / "launch").returncode == 0
    (rank,) = hosts.ranks(1)
    rank.send_signal(signal.SIGTERM)
    wait_until(lambda: "multinode: node2 has no checkout" in job.output(), job.output, command)
    assert hosts.run(2, "umount", ROOT / "launch").returncode == 0
    assert command.wait(TIMEOUT_SECONDS) == 0, job.output()
    status = ending.read(job.run_dir)
    assert status and status["state"] == "done"
    assert resumes(job) == 2 and world_size(job) == 2
    assert job.column("step") == list(range(1, 61))
    assert job.column("data/digest") == whole.column("data/digest")
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), rel=1e-6)
    assert not hosts.ranks(1) and not hosts.ranks(2)


def test_without_ssh_the_command_is_given_on_each_host(
    tmp_path: Path, index: Path, hosts: Hosts, sweep: bool
) -> None:
    if not sweep:
        pytest.skip("with --sweep: the part of launch/multinode.sh that --no-ssh shares is tested above")
    job = Job(tmp_path / "job", index)
    shared = ("--no-ssh", "--master-addr", "node1", "--pause", "1")
    commands = [multinode(hosts, job, *shared, "--node-rank", str(n - 1), node=n) for n in (1, 2)]
    wait_until(job.reached(12), job.output, commands[0])
    (rank,) = hosts.ranks(2)
    rank.send_signal(signal.SIGTERM)  # both start again
    wait_until(lambda: resumes(job) == 1, job.output, commands[0])
    wait_until(job.reached(max(job.checkpoints()) + 3), job.output, commands[0])
    for command in commands:
        send(command, signal.SIGTERM)
    assert [command.wait(TIMEOUT_SECONDS) for command in commands] == [75, 75], job.output()
    status = ending.read(job.run_dir)
    assert status and status["state"] == "preempted" and status["step"] == max(job.checkpoints())


def test_a_network_cut_in_silence_ends_both_sides_and_one_host_goes_on(
    tmp_path: Path, index: Path, hosts: Hosts, sweep: bool
) -> None:
    if not sweep:
        pytest.skip("with --sweep: a host is lost, and a rank hangs, in other tests")
    job = Job(tmp_path / "job", index)
    limits = ("guard.step_minutes=0.2", "guard.data_minutes=0.2", "--min-hosts", "1", "--pause", "1")
    command = multinode(hosts, job, *limits)
    wait_until(job.reached(12), job.output, command)
    (rank,) = hosts.ranks(2)
    hosts.unplug(2)
    cut = time.monotonic()
    wait_until(lambda: not rank.is_running(), job.output, command)
    print(f"{time.monotonic() - cut:.1f} s from the cut to the end of the rank that is cut off")
    wait_until(lambda: resumes(job) == 1, job.output, command)
    print(f"{time.monotonic() - cut:.1f} s to the resume on the other host")
    assert command.wait(TIMEOUT_SECONDS) == 0, job.output()
    # Each side finds the other silent; either may be the first.
    assert re.search(r"the job hangs: rank [01] \(process .*; it does not answer", job.output())
    assert world_size(job) == 1 and job.column("step") == list(range(1, 61))


def test_torchrun_shrinks_and_grows(tmp_path: Path, index: Path, hosts: Hosts, sweep: bool) -> None:
    """One agent on each host: node2 joins in mid-run, loses its power, and joins again."""
    if not sweep:
        pytest.skip("with --sweep: agents on one host come and go in test_restarts.py")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    long = (*COMMON, "total_steps=150", "engine.micro_batch=1")
    assert whole.start(1, *long, "engine.micro_batch=8") == [0], whole.output()
    first = agent(hosts, 1, job, *long)
    wait_until(job.reached(6), job.output, first)
    agent(hosts, 2, job, *long)
    wait_until(lambda: world_size(job) == 2, job.output, first)
    hosts.switch_off(2)
    cut = time.monotonic()
    wait_until(lambda: world_size(job) == 1, job.output, first)
    print(f"{time.monotonic() - cut:.1f} s from the power failure to a checkpoint of node1 alone")
    hosts.switch_on(2)
    agent(hosts, 2, job, *long)
    wait_until(lambda: world_size(job) == 2, job.output, first)
    assert first.wait(2 * TIMEOUT_SECONDS) == 0, job.output()
    assert job.column("data/digest") == whole.column("data/digest")
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), rel=1e-6)


def agent(hosts: Hosts, node: int, job: Job, *overrides: str) -> subprocess.Popen[bytes]:
    """torchrun for one process on a host."""
    words = [
        *(PYTHON, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"),
        *("--max-restarts", "9", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29500"),
        *(
            "--rdzv_id",
            "job",
            "--rdzv_conf",
            "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3",
        ),
        *("launch/train.py", job.config, *overrides),
    ]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(hosts.folder)}
    return hosts.start(node, words, job.log, environment)


def multinode(hosts: Hosts, job: Job, *options: str, node: int = 1) -> subprocess.Popen[bytes]:
    """launch/multinode.sh on a host, for one process on each of both."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    words = ["bash", "launch/multinode.sh", hostfile, job.config, *RUN, *options]
    return hosts.start(node, words, job.log, {"AWS_SECRET_ACCESS_KEY": SECRET})


def resumes(job: Job) -> int:
    return job.output().count("resumed from")


def world_size(job: Job) -> int:
    """How many ranks wrote the newest checkpoint."""
    return Manifest.load(max(job.checkpoints().items())[1]).world_size
