"""What is said of hosts whose answers over ssh do not come."""

import os
import sys
from pathlib import Path

import pytest

from vitscale.cluster.preflight import rounds


@pytest.mark.parametrize(
    ("program", "seconds", "trouble", "unreachable"),
    [
        ("exec cat", 0.01, "node1 did not answer for 0 s; look at what keeps it busy", True),
        ("echo no route >&2; exit 255", 60.0, "node1 cannot be reached by ssh: no route; `ssh node1", True),
        ("exit 101", 60.0, f"node1 has no checkout of vitscale at {rounds.ROOT}; it must be at", False),
        ("exit 102", 60.0, f"node1 has no {sys.executable}; run bash tools/setup.sh in", False),
        ("exit 3", 60.0, "node1: launch/preflight.py ended there with status 3: status 3", False),
    ],
)
def test_a_host_that_does_not_answer_is_named_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    seconds: float,
    trouble: str,
    unreachable: bool,
) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(rounds, "ROUND_SECONDS", seconds)
    monkeypatch.setattr(rounds, "CHECK_SECONDS", 2.0)
    (answer,) = rounds.ask({"node1": 1}, [], {})
    assert answer.trouble.startswith(trouble) and answer.unreachable is unreachable
