"""What is found before the first step, when it costs nothing yet."""

import socket
import subprocess
import sys
from pathlib import Path

from make import jpeg, write_tar
from multiprocess.ends import read_status
from multiprocess.hosts import ROOT
from multiprocess.job import PROGRAM, TIMEOUT_SECONDS, Job, reserved_port
from multiprocess.zygote import Zygote

ENDED = ROOT / "launch" / "ended.py"


def test_a_mistake_that_an_evaluation_finds_before_the_first_step_binds_nobody(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    broken = write_tar(tmp_path / "test.tar", [("a.jpg", jpeg(1)[:100]), ("a.cls", b"0")])
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, f"evals.test.test={broken}", "evals.test.every_steps=5").count(2) >= 1
    assert "test.tar" in job.output() and job.output().count("error: ") == 1, job.output()
    assert not (job.run_dir / "config.toml").exists() and not job.rows()
    assert zygote.train(job, 1, "optim.lr=1e-4", "total_steps=6") == [0], job.output()


def test_a_launcher_that_hides_the_exit_status_does_not_hide_a_mistake(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    ask = [sys.executable, ENDED, job.config, "--launcher-status", "1"]
    ended = subprocess.run(ask, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout[:6]) == (75, "again:"), ended
    assert not job.run_dir.exists(), "who only asks counts no start"
    assert zygote.train(job, 2, "data.index=gone.json") == [2, 2], job.output()
    assert not (job.run_dir / "config.toml").exists()
    status = read_status(job)
    assert (status["step"], status["total_steps"]) == (0, 0)  # nothing is known of it
    ended = subprocess.run(ask, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout[:6]) == (2, "stop: "), ended
    assert "gone.json" in ended.stdout
    assert zygote.train(job, 1, "total_steps=6") == [0], job.output()


def test_a_node_that_does_not_share_the_run_directory_is_refused(tmp_path: Path, index: Path) -> None:
    """The second node is a mount namespace with another file system at run_dir."""
    job = Job(tmp_path, index)
    job.run_dir.mkdir()
    command = [sys.executable, PROGRAM, job.config]
    elsewhere = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs tmpfs "$0" && exec "$@"',
        job.run_dir,
    ]
    with reserved_port() as port:
        common = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            job.popen(command, common | {"RANK": 0}),
            job.popen([*elsewhere, *command], common | {"RANK": 1}),
        ]
        try:
            assert [rank.wait(TIMEOUT_SECONDS) for rank in ranks] == [2, 2], job.output()
        finally:
            for rank in ranks:
                rank.kill()
    assert f"{job.run_dir}/checkpoints on this node is not the folder that rank 0 sees" in job.output()
    assert job.output().count("error: ") == 1 and not job.rows(), job.output()


def test_shared_memory_that_data_workers_would_fill_is_refused(tmp_path: Path, index: Path) -> None:
    """As in a container, with 1 MB: three steps of 8 images of 128 px are ready at most."""
    job = Job(tmp_path, index)
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", small, "sh", sys.executable, PROGRAM]
    options = ("model.image_size=128", "model.patch_size=32", "total_steps=6", "engine.num_workers=1")
    rank = job.popen([*command, job.config, *options], {"OMP_NUM_THREADS": 1})
    assert rank.wait(TIMEOUT_SECONDS) == 2, job.output()
    said = "/dev/shm has 1.05 MB free, and the machine's data workers fill 1.18 MB; enlarge it"
    assert job.output().count(said) == job.output().count("error: ") == 1, job.output()
    rank = job.popen([*command, job.config, *options[:-1], "engine.num_workers=0"], {"OMP_NUM_THREADS": 1})
    assert rank.wait(TIMEOUT_SECONDS) == 0, job.output()


def test_a_port_that_is_taken_is_named(tmp_path: Path, index: Path) -> None:
    job = Job(tmp_path, index)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment |= {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        rank = job.popen([sys.executable, PROGRAM, job.config], environment)
        assert rank.wait(TIMEOUT_SECONDS) == 2, job.output()
    assert f"error: port {port} of " in job.output() and "is taken by another program" in job.output()
    assert "Traceback" not in job.output()


def test_a_loopback_interface_that_is_down_is_named() -> None:
    program = "from vitscale import command, distributed as d; exit(command.run(d.initialize))"
    words = ["unshare", "--map-root-user", "--net", sys.executable, "-c", program]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert ended.returncode == 2 and "error: 127.0.0.1 does not answer (Network is unr" in ended.stderr


def test_what_a_process_alone_starts_is_alone_too() -> None:
    """A notebook that has trained, or a script that trains twice."""
    joined = "import subprocess, sys; from vitscale import distributed as d; d.initialize(); "
    child = joined + "print(d.rank(), d.world_size())"
    parent = joined + f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    ended = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert ended.stdout.split() == ["0", "1"], ended.stderr
