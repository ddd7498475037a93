"""What launch/multinode.sh finds before it asks any host."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from launch.multinode import main
from vitscale.cluster import multinode
from vitscale.cluster.preflight import facts, rounds
from vitscale.guard import watch

PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "multinode.py"


@pytest.mark.parametrize("module", [multinode, facts, rounds])
def test_hosts_run_in_the_checkout_and_compare_its_code(module: ModuleType) -> None:
    assert PROGRAM == module.ROOT / "launch" / "multinode.py"


@pytest.mark.parametrize(
    ("on_path", "root", "sentence"),
    [
        ([], "/srv/vitscale", "error: there is no pdsh here"),
        (["pdsh"], "/srv/my runs", "error: deepspeed does not quote the path of this checkout, /srv/my runs"),
    ],
)
def test_what_deepspeed_could_not_start_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_path: list[str],
    root: str,
    sentence: str,
) -> None:
    for name in on_path:
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(multinode, "ROOT", Path(root))
    monkeypatch.setattr(multinode.os, "chdir", lambda _: None)
    assert main([str(tmp_path / "hostfile"), str(tmp_path / "run.toml")]) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_all_that_is_wrong_with_the_hosts_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pdsh").touch(mode=0o755)
    (tmp_path / "ssh").write_text(f"#!/bin/sh\nexit {rounds.NO_CHECKOUT}\n")
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(multinode.os, "chdir", lambda _: None)
    before = {number: signal.getsignal(number) for number in watch.stop_signals()}
    try:
        run_dir = f"run_dir={tmp_path / 'run'}"
        assert main([str(tmp_path / "hostfile"), str(tmp_path / "run.toml"), run_dir]) == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    told = [line.partition(" at ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"error: {name} has no checkout of vitscale" for name in ("node1", "node2")]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--min-hosts=3", "--min-hosts 3 must be from 0 to 2, the hosts of"),
        ("--min-hosts=-1", "--min-hosts -1 must be from 0 to 2"),
        ("--max-vain=0", "--max-vain 0 must be at least 1"),
        ("--pause=-1", "--pause -1 not negative"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    sentence: str,
) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.setattr(multinode.os, "chdir", lambda _: None)
    given = [str(tmp_path / "hostfile"), str(tmp_path / "run.toml"), option]
    assert main([*given, "--no-ssh", "--node-rank=0", "--master-addr=node1"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_start_that_a_signal_to_the_command_ended_is_none_in_vain(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    words = [sys.executable, PROGRAM, tmp_path / "hostfile", tmp_path / "run.toml"]
    words += [f"run_dir={tmp_path / 'run'}", "--no-ssh", "--node-rank=0", "--master-addr=localhost"]
    with subprocess.Popen([*words, "--max-vain=1"], stdout=subprocess.PIPE, text=True) as command:
        while not psutil.Process(command.pid).children() and command.poll() is None:
            time.sleep(0.05)
        command.send_signal(signal.SIGTERM)
        output, _ = command.communicate(timeout=60)
    assert command.returncode == 75, output
    assert "stopped by a signal" in output


CONFIG = """
run_dir = "run"
global_batch = 8
total_steps = 1
model = {variant = "Ti/16", num_classes = 5}
data = {index = "index.json"}
"""
