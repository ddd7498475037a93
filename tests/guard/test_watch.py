"""Which processes are still there, above a rank and beside it, and what asks a rank to stop."""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import pytest

from vitscale.guard import watch

RANK = "/env/bin/python -u launch/train.py"
LAUNCH = "/env/bin/python -u -m deepspeed.launcher.launch"
RUNNER = "/env/bin/python /env/bin/deepspeed --num_gpus"
SSHD = "sshd: user@notty"


@pytest.mark.parametrize(
    ("commands", "top"),
    [
        ([LAUNCH, RUNNER, "-bash", "sshd: user@pts/0", "/sbin/init"], 2),  # the user's own session may end
        ([LAUNCH, SSHD, "sshd: user [priv]", "/sbin/init"], 2),
        ([LAUNCH, "bash -c cd /code; exec", SSHD, "/sbin/init"], 3),
        ([LAUNCH, "/sbin/init"], 1),
        (["-bash", "/sbin/init"], 0),
    ],
)
def test_what_belongs_to_the_deepspeed_launcher(commands: list[str], top: int) -> None:
    assert watch._top_of_deepspeed(commands) == top


@pytest.mark.parametrize(
    ("variables", "length"),
    [
        ({}, 0),
        ({"TORCHELASTIC_RUN_ID": "x"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, 1),
        ({"SLURM_PROCID": "0"}, 0),  # a batch script
        ({"CROSS_RANK": "0"}, 0),  # left in the environment: no deepspeed is above
    ],
)
def test_a_launcher_is_known_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], length: int
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_PROCID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ancestry = watch.launcher_ancestry()
    assert len(ancestry) == length
    if ancestry:
        assert ancestry == [(psutil.Process(), os.getppid())]
    assert watch.intact(ancestry)


@pytest.mark.parametrize("variable", ["CROSS_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_is_looked_for_also_where_other_users_are_hidden(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "0")
    child = os.fork()
    if not child:
        status = 9
        try:
            libc = ctypes.CDLL(None)
            if libc.unshare(0x20000):  # CLONE_NEWNS
                os._exit(77)
            assert not libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
            assert not libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=1")
            os.setgroups([])
            os.setgid(65534)  # a member of group 0 would see all
            os.setuid(65534)
            with pytest.raises(psutil.AccessDenied):
                psutil.Process().parents()
            ancestry = watch.launcher_ancestry()
            status = len(ancestry) if watch.intact(ancestry) else 8
        except BaseException:  # pytest's own failures, too: this process must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("only root makes another /proc and becomes another user")
    assert status == int(variable == "TORCHELASTIC_RUN_ID")


CHILD_OF_SHELL = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


def test_an_orphan_has_lost_its_launcher() -> None:
    shell = subprocess.Popen(
        ["bash", "-c", f'{sys.executable} -c "{CHILD_OF_SHELL}" <&0 & wait'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert shell.stdin and shell.stdout
    with shell.stdin, shell.stdout:
        child = psutil.Process(int(shell.stdout.readline()))
        ancestry = [(child, shell.pid)]
        assert watch.intact(ancestry)
        shell.kill()
        shell.wait()
        assert child.is_running() and not watch.intact(ancestry)
        child.kill()
        child.wait()
        assert not watch.intact(ancestry)


def test_a_step_of_the_clock_makes_no_dead_of_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    lines = Path("/proc/stat").read_text().splitlines()
    boot_time = next(line for line in lines if line.startswith("btime "))
    (tmp_path / "stat").write_text(f"btime {int(boot_time.split()[1]) + 1}\n")
    (tmp_path / str(child.pid)).symlink_to(f"/proc/{child.pid}")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert watch.lives(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not watch.lives(process)  # a zombie
    child.wait()
    assert not watch.lives(process)


def test_a_look_for_the_stop_file_that_fails_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    before = {number: signal.getsignal(number) for number in watch.SIGNALS}
    stop_file = tmp_path / "stop"
    stop_file.symlink_to("x" * 300)  # OSError: File name too long
    try:
        with watch.Watch(lambda _: 1, stop_file) as watching:
            time.sleep(0.1)
            stop_file.unlink()
            stop_file.touch()
            deadline = time.monotonic() + 5
            while not watching.asked and time.monotonic() < deadline:
                time.sleep(0.01)
            assert watching.reason == f"the file {stop_file} (rank 0)"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("before", "reason"), [(lambda *_: None, "SIGHUP (rank 0)"), (signal.SIG_IGN, "")], ids=["shell", "nohup"]
)
def test_a_terminal_that_is_closed_asks_to_stop_unless_under_nohup(before: Any, reason: str) -> None:
    previous = {number: signal.getsignal(number) for number in watch.SIGNALS}
    signal.signal(signal.SIGHUP, before)
    try:
        with watch.Watch(lambda _: 1) as watching:
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + (5 if reason else 0.2)
            while not watching.asked and time.monotonic() < deadline:
                time.sleep(0.01)
        assert watching.reason == reason
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
