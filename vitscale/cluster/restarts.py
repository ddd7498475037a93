"""Whether to start a run again after a start has ended, however it was launched.

What decides is RUN/status.json, and how far the last starts came: launchers return 0, 1, 143
and others for the same end.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitscale import config as configs
from vitscale.checkpoint.store import Home
from vitscale.errors import MISTAKE, PREEMPTED, BusyError, StoreDown
from vitscale.guard import ending
from vitscale.run_dir import history
from vitscale.run_dir.directory import CONFIG_NAME
from vitscale.run_dir.lock import RunLock
from vitscale.system import atomic
from vitscale.train_config import TrainConfig

logger = logging.getLogger(__name__)

Kind = Literal["done", "again", "stop"]
EXIT_STATUS: dict[Kind, int] = {"done": 0, "again": PREEMPTED, "stop": MISTAKE}
FILE_NAME = "restarts.json"
# What reading a step raises for a line or a file that is damaged, as a kill leaves them.
_DAMAGE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
# Until the ranks have saved after their launcher has ended, which may kill them itself by then.
SAVING_SECONDS = 300.0


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

    status: the content of status.json; None = none can be read. is_old: an earlier start
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
            reason = f"there is no {ending.STATUS_NAME} that can be read"
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
            return Decision("stop", f"{reason} asked it to; the same command continues")
        if state == "running":
            reason = "it was killed"
    if num_vain >= max_vain:
        return Decision(
            "stop",
            f"{num_vain} {'start' if num_vain == 1 else 'starts in a row'} brought no new checkpoint; the "
            f"last one: {reason}; fix that, save more often (checkpoint.every_steps), or start it by hand",
        )
    return Decision("again", f"{state}: {reason}" if reason else state)


class Vain(NamedTuple):
    """How many starts in a row brought no new checkpoint. step: of the newest one, 0 = none."""

    step: int
    starts: int = 0

    def and_one(self, newest: int | None) -> "Vain":
        """The count after one more start, which left the newest checkpoint at that step.

        None = its store does not answer, so that the start counts as one in vain.
        """
        if newest is None or newest == self.step:
            return Vain(self.step, self.starts + 1)
        return Vain(newest)


def after(
    config: TrainConfig, launcher_status: int | None, max_vain: int, *, since: float = 0.0, node: int = 0
) -> Decision:
    """Decide after a start of a run, whose ranks it awaits, and count it in RUN/restarts.json.

    since: when the start began, in seconds since the epoch; without it the start is not
    counted. node: number of the machine that asks, of several that ask after the same start;
    machine 0 counts it. Raises BusyError if a rank still holds the run after SAVING_SECONDS.
    """
    await_ranks(config.run_dir)
    status, counts = ending.read(config.run_dir), bool(since) and not node
    vain = count(config.run_dir, newest_step(config), adds=counts)
    is_old = bool(status) and ending.written_at(status) < since and not is_finished(config, status)
    decision = decide(status, launcher_status, vain.starts, max_vain, is_old=is_old)
    if counts and decision.kind != "again":  # whoever starts it now has dealt with what ended it
        forget(config.run_dir)
    return decision


def await_ranks(run_dir: str | Path) -> None:
    """Wait while a rank holds the run: it may be saving after its launcher has ended.

    Raises BusyError after SAVING_SECONDS.
    """
    deadline = time.monotonic() + SAVING_SECONDS
    while True:
        try:
            RunLock.check(run_dir)
            return
        except BusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def is_finished(config: TrainConfig, status: Mapping[str, Any]) -> bool:
    """Whether a start has done all that this config asks for, whenever that was."""
    path = Path(config.run_dir) / CONFIG_NAME
    try:
        return status["state"] == "done" and path.read_text(encoding="utf-8") == configs.to_toml(config)
    except (OSError, UnicodeDecodeError):
        return False


def newest_step(config: TrainConfig) -> int | None:
    """Of the run's newest checkpoint; 0 if it has none, None if its store does not answer."""
    try:
        newest = Home.of(config.run_dir, config.checkpoint).newest()
    except StoreDown as error:
        logger.warning("%s", error)
        return None
    return newest[0] if newest else 0


def count(run_dir: str | Path, newest: int | None, *, adds: bool = True) -> Vain:
    """The vain starts of a run so far, by RUN/restarts.json.

    newest: the step of the newest checkpoint; None = unknown. adds: whether a start has ended
    since, which is then written down.
    """
    path = Path(run_dir) / FILE_NAME
    try:
        values = json.loads(path.read_bytes())
        vain = Vain(int(values["step"]), int(values["starts"]))
    except (OSError, *_DAMAGE):
        vain = Vain(_last_beginning(run_dir))
    if adds:
        vain = vain.and_one(newest)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(path, json.dumps(vain._asdict()).encode())
    return vain


def _last_beginning(run_dir: str | Path) -> int:
    """The step at which the newest start of a run began."""
    path, step = Path(run_dir) / history.FILE_NAME, 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(*_DAMAGE):
            step = int(json.loads(line)["step"])
    return step


def forget(run_dir: str | Path) -> None:
    """Count from 0 again."""
    with contextlib.suppress(OSError):
        (Path(run_dir) / FILE_NAME).unlink(missing_ok=True)
