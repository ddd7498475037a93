"""Whether to start a run again after a start has ended, however it was launched.

What decides is RUN/status.json, and how far the last starts came: launchers return 0, 1, 143
and others for the same end.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vitscale import ending, history
from vitscale.checkpoint.store import Home
from vitscale.run_dir import RunLock
from vitscale.train_config import TrainConfig

Kind = Literal["done", "again", "stop"]
EXIT_STATUS: dict[Kind, int] = {"done": 0, "again": ending.PREEMPTED, "stop": 2}
MISTAKE = 2


@dataclasses.dataclass(frozen=True)
class Decision:
    kind: Kind
    reason: str


def decide(
    status: Mapping[str, Any] | None, launcher_status: int | None, num_vain: int, max_vain: int
) -> Decision:
    """What to do after a start.

    status: the content of status.json; None = there is none. launcher_status: what the launcher
    returned, which is believed where there is no status.json, or where it says that the user
    must fix something; None = not known. num_vain: how many of the last starts, this one
    included, brought no new checkpoint; at max_vain it ends.

        status.json              num_vain    what to do
        done                     any         done
        failed, exit_status 2    any         stop: the same would happen again
        failed, exit_status 1    below max   again: a rank was lost, or a bug of ours
        preempted                below max   again
        running                  below max   again: all processes were killed
        any but done             max         stop
    """
    if not status:
        if launcher_status == 0:
            return Decision("done", "the launcher ended with status 0")
        if launcher_status == MISTAKE:
            return Decision("stop", "it was refused; the line above says why")
        state, reason = "not begun", f"the launcher ended with status {launcher_status}"
    else:
        state, reason = status["state"], str(status.get("reason", ""))
        if state == "done":
            return Decision("done", f"all {status['total_steps']:,} steps are done")
        # Versions before this key stopped at every failure.
        if state == "failed" and status.get("exit_status", MISTAKE) == MISTAKE:
            return Decision("stop", reason)
        if launcher_status == MISTAKE and state != "failed":
            return Decision("stop", "it was refused; the line above says why")
        if state == "running":
            reason = "it was killed"
    if num_vain >= max_vain:
        return Decision(
            "stop",
            f"{num_vain} starts in a row brought no new checkpoint; the last one: {reason}; fix that, save "
            "more often (checkpoint.every_steps), or start it by hand",
        )
    return Decision("again", f"{state}: {reason}" if reason else state)


def after(config: TrainConfig, launcher_status: int | None, max_vain: int) -> Decision:
    """What to do after a start of this run has ended."""
    home = Home.of(config.run_dir, config.checkpoint)
    committed = home.committed()
    newest = committed[0][0] if committed else 0
    vain = num_vain(starting_steps(config.run_dir), newest)
    return decide(ending.read(config.run_dir), launcher_status, vain, max_vain)


def num_vain(steps: Sequence[int], newest: int) -> int:
    """How many of the last starts began at the newest checkpoint, and so brought no newer one.

    steps: where each start began. For example, 0, 500, 700, 700, 700 with the newest at 700: 3.
    """
    count = 0
    while count < len(steps) and steps[-1 - count] == newest:
        count += 1
    return count


def starting_steps(run_dir: str | Path) -> list[int]:
    """The steps at which the starts of a run began, in their order."""
    path = Path(run_dir) / history.FILE_NAME
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
    return steps


def check_free(run_dir: str | Path) -> None:
    """Raise BusyError if a job holds the run directory, naming it."""
    if Path(run_dir).is_dir():
        RunLock(run_dir).release()
