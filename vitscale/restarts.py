"""Whether to start a run again after a start has ended, however it was launched.

What decides is RUN/status.json, and how far the last starts came: launchers return 0, 1, 143
and others for the same end.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitscale import atomic, ending, history
from vitscale.checkpoint.store import Home
from vitscale.train_config import TrainConfig

Kind = Literal["done", "again", "stop"]
EXIT_STATUS: dict[Kind, int] = {"done": 0, "again": ending.PREEMPTED, "stop": 2}
MISTAKE = 2
FILE_NAME = "restarts.json"


@dataclasses.dataclass(frozen=True)
class Decision:
    kind: Kind
    reason: str


def decide(
    status: Mapping[str, Any] | None,
    launcher_status: int | None,
    num_vain: int,
    max_vain: int,
    *,
    is_old: bool = False,
) -> Decision:
    """What to do after a start.

    status: the content of status.json; None = there is none. is_old: an earlier start
    wrote it. launcher_status: what the launcher returned, which is believed where
    this start wrote no status, or where it says that the user must fix something; None = not
    known. num_vain: how many of the last starts, this one included, brought no new checkpoint;
    at max_vain it ends.

        status.json                num_vain    what to do
        done                       any         done
        failed, exit_status 2      any         stop: the same would happen again
        stopped                    any         stop: somebody wants it to end
        failed, any other          below max   again: a process or store was lost, a bug, Ctrl-C
        preempted                  below max   again
        running                    below max   again: all processes were killed
        any but done               max         stop
    """
    if not status or is_old:
        # deepspeed may return 0 after a kill, so 0 means done only where no status can be seen.
        if launcher_status == 0 and not status:
            return Decision("done", "the launcher ended with status 0")
        if launcher_status == MISTAKE:
            return Decision("stop", "it was refused; the line above says why")
        state, reason = "not begun", f"the launcher ended with status {launcher_status}"
        if launcher_status is None:
            reason = f"there is no {ending.STATUS_NAME}"
    else:
        state, reason = status["state"], str(status.get("reason", ""))
        if state == "done":
            return Decision("done", f"all {status['total_steps']:,} steps are done")
        # Versions before this key stopped at every failure.
        if state == "failed" and status.get("exit_status", MISTAKE) == MISTAKE:
            return Decision("stop", reason)
        if launcher_status == MISTAKE and state != "failed":
            return Decision("stop", "it was refused; the line above says why")
        if state == "stopped":
            return Decision("stop", f"{reason} asked it to; the same command goes on")
        if state == "running":
            reason = "it was killed"
    if num_vain >= max_vain:
        return Decision(
            "stop",
            f"{num_vain} starts in a row brought no new checkpoint; the last one: {reason}; fix that, save "
            "more often (checkpoint.every_steps), or start it by hand",
        )
    return Decision("again", f"{state}: {reason}" if reason else state)


class Vain(NamedTuple):
    """How many starts in a row brought no new checkpoint. step: of the newest one, 0 = none."""

    step: int
    starts: int = 0

    def and_one(self, newest: int) -> "Vain":
        """The count after one more start, which left the newest checkpoint at that step."""
        return Vain(newest, self.starts + 1 if newest == self.step else 0)


def newest_step(config: TrainConfig) -> int:
    """Of the run's newest checkpoint; 0 if it has none."""
    committed = Home.of(config.run_dir, config.checkpoint).committed()
    return committed[0][0] if committed else 0


def count(run_dir: str | Path, newest: int, *, adds: bool = True) -> Vain:
    """Count the vain starts of a run, in RUN/restarts.json.

    newest: the step of the newest checkpoint. adds: whether a start has ended since; of several
    machines that ask after the same start, one says so.
    """
    path = Path(run_dir) / FILE_NAME
    try:
        vain = Vain(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        vain = Vain(([0, *starting_steps(run_dir)])[-1])
    if adds:
        vain = vain.and_one(newest)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(path, json.dumps(vain._asdict()).encode())
    return vain


def forget(run_dir: str | Path) -> None:
    """Count from 0 again: whoever starts the run now has dealt with what ended it."""
    with contextlib.suppress(OSError):
        (Path(run_dir) / FILE_NAME).unlink(missing_ok=True)


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
