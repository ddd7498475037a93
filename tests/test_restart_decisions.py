"""Whether a run is started again, by its status.json and how far its last starts came."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitscale import history, restarts
from vitscale.restarts import decide

PREEMPTED = {"state": "preempted", "total_steps": 9, "reason": "SIGTERM (rank 3)", "exit_status": 75}
LOST = {"state": "failed", "total_steps": 9, "reason": "rank 1 has died", "exit_status": 1}
MISTAKE = {"state": "failed", "total_steps": 9, "reason": "the index is gone", "exit_status": 2}
OLDER = {"state": "failed", "total_steps": 9, "reason": "rank 1 has died"}
RUNNING = {"state": "running", "total_steps": 9, "reason": "", "exit_status": None}
DONE = {"state": "done", "total_steps": 9, "reason": "", "exit_status": 0}


@pytest.mark.parametrize(
    ("status", "launcher", "vain", "kind", "reason"),
    [
        (DONE, 1, 9, "done", "all 9 steps are done"),
        (PREEMPTED, 0, 1, "again", "preempted: SIGTERM (rank 3)"),
        (RUNNING, 255, 1, "again", "running: it was killed"),
        (LOST, 247, 1, "again", "failed: rank 1 has died"),
        (MISTAKE, 1, 1, "stop", "the index is gone"),
        (OLDER, 1, 1, "stop", "rank 1 has died"),
        (PREEMPTED, 2, 1, "stop", "it was refused; the line above says why"),
        (LOST, 1, 5, "stop", "5 starts in a row brought no new checkpoint; the last one: rank 1 has died"),
        (PREEMPTED, 75, 5, "stop", "5 starts in a row brought no new checkpoint"),
        (None, 0, 0, "done", "the launcher ended with status 0"),
        (None, 2, 0, "stop", "it was refused"),
        (None, 1, 0, "again", "not begun: the launcher ended with status 1"),
    ],
)
def test_what_is_done_after_an_end(
    status: dict[str, Any] | None, launcher: int, vain: int, kind: str, reason: str
) -> None:
    decision = decide(status, launcher, vain, max_vain=5)
    assert decision.kind == kind and decision.reason.startswith(reason)


@pytest.mark.parametrize(
    ("steps", "newest", "count"),
    [([], 0, 0), ([0], 0, 1), ([0, 0, 0], 0, 3), ([0, 500, 700, 700, 700], 700, 3), ([0, 500, 700], 900, 0)],
)
def test_starts_that_brought_no_checkpoint_are_counted(steps: list[int], newest: int, count: int) -> None:
    assert restarts.num_vain(steps, newest) == count


def test_the_steps_of_the_starts_are_read_from_the_history(tmp_path: Path) -> None:
    assert restarts.starting_steps(tmp_path) == []
    rows = [json.dumps({"step": step}) for step in (0, 12)]
    (tmp_path / history.FILE_NAME).write_text("\n".join([*rows, '{"step": 1']))
    assert restarts.starting_steps(tmp_path) == [0, 12]
