"""How each start of a run ends: RUN/status.json, and the first cause of a failure, told once.

    {"state": "preempted", "step": 12000, "total_steps": 500000, "reason": "SIGTERM (rank 3)",
     "exit_status": 75, "diverged": false, "time": "2026-03-01T04:12:33+0000"}

    state       meaning
    running     it has begun; if no process runs any more, it was killed
    done        all of its steps are done
    preempted   a signal asked it to stop, and it has saved: start it again
    stopped     the file RUN/stop asked it to stop, and it has saved: its end is wanted
    failed      `reason` says why

exit_status is that of the rank, before a launcher makes another of it; null while it runs. Of a
run that failed it is 2 where the user must fix something, 130 after a second Ctrl-C, and else
1: a process was lost, or a store did not answer. diverged: it failed because its losses or
gradients were not finite (errors.Diverged), with exit_status 2. Earlier versions lack the key.

Schedulers decide by this file: launchers return 0, 1, 143 and others for the same end.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from vitscale import distributed
from vitscale.errors import FAILED, PREEMPTED, Diverged, RankLost, Told, UserError, killed_worker, status_of
from vitscale.progress import Progress
from vitscale.redaction import redact
from vitscale.system import atomic

logger = logging.getLogger(__name__)
STATUS_NAME = "status.json"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
_BEGUN, _CAUSE = ".begun-", ".cause-"
# For how long to look for a dead rank once a connection is lost.
DEATH_SECONDS = 1.0
NOTE_SECONDS = 5.0  # for a thread's note of why the process ends: its file server may be what hangs
State = Literal["running", "done", "preempted", "stopped", "failed"]
_EXIT_STATUS: dict[State, int | None] = {
    "running": None,
    "done": 0,
    "preempted": PREEMPTED,
    "stopped": PREEMPTED,
    "failed": FAILED,
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a rank fails: what a user should read, and whether this rank tells it."""

    error: BaseException
    told_here: bool


class Ending:
    """One start of a run, until it ends; every rank enters it, within the run's lock.

    An exception that leaves the block is the run's failure. When one rank fails, the others
    lose the connection to it and fail as well: only the first failure leaves the block as it
    is. On the other ranks it becomes Told, which is not printed. What all ranks raise alike
    (UserError.shared) leaves it on all of them.
    """

    def __init__(self, run_dir: str | Path, total_steps: int) -> None:
        self.progress = Progress()
        # Which ranks are dead, where that can be known.
        self.lost: Callable[[float], RankLost | None] = lambda _: None
        self._folder, self._total_steps = Path(run_dir), total_steps
        self._token = ""
        self._failure: Failure | None = None  # the first one of this rank
        self._noting = threading.Lock()

    def __enter__(self) -> "Ending":
        self._token = distributed.broadcast_json(secrets.token_hex(4))
        distributed.together(self._begin)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        failure = self.note(error)
        cause = failure.error
        if not failure.told_here and not _is_shared(cause):
            raise Told from error
        if cause is not error:
            raise cause from cause.__cause__  # without what closing the run raised after it

    def note(self, error: BaseException) -> Failure:
        """Note that this rank fails; later errors are taken for consequences of the first one.

        If this rank tells the failure, status.json has it too.
        """
        with self._noting:  # a thread may end the process while the trainer notes
            if not self._failure:
                cause = self._cause(error)
                if cause is not error:
                    cause.__cause__ = error
                # Asked in any case: it takes the note, so that no later rank is the first.
                is_first = self._is_first()
                # What all ranks raise alike, rank 0 tells, whichever of them came first.
                told_here = distributed.is_main() if _is_shared(cause) else is_first
                if told_here:
                    self._write_failed(cause)
                self._failure = Failure(cause, told_here)
            return self._failure

    def tell(self, error: BaseException, details: str = "") -> int:
        """Print why this process ends, for the thread that ends it; returns its exit status.

        If this rank has failed before, that is why: it hangs while it closes the run. Nothing
        is printed where another rank tells the cause. details: to print after the error.
        """
        noted: list[Failure] = []
        thread = threading.Thread(target=lambda: noted.append(self.note(error)), daemon=True)
        thread.start()
        thread.join(NOTE_SECONDS)
        failure = noted[0] if noted else Failure(error, told_here=True)  # rather twice than never
        if failure.told_here:
            lines = [f"error: {_sentence(failure.error)}"]
            if details and failure.error is error:
                lines.append(details)
            print("\n".join(lines), file=sys.stderr, flush=True)
        return status_of(failure.error)

    def _write_failed(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # a full disk may be the very cause
            step, total, status = self.progress.step, self._total_steps, status_of(error)
            diverged = isinstance(error, Diverged)
            write(self._folder, "failed", step, total, _sentence(error), status, diverged=diverged)

    def _begin(self) -> None:
        """Leave a note for the first rank that fails, in the folder of each node."""
        if distributed.local_rank() == 0:  # with checkpoint.store, each node may have its own folder
            self._folder.mkdir(parents=True, exist_ok=True)
            note = self._folder / f"{_BEGUN}{self._token}"
            for old in (*self._folder.glob(f"{_BEGUN}*"), *self._folder.glob(f"{_CAUSE}*")):
                if old != note:
                    old.unlink(missing_ok=True)
            note.touch()
        if distributed.is_main():
            self.write("running")

    def _cause(self, error: BaseException) -> BaseException:
        """What a user should read in place of another library's error, where we know better."""
        if distributed.lost_connection(error):
            first_line = str(error).strip().splitlines()[0]
            return self.lost(DEATH_SECONDS) or RankLost(
                f"the connection to another rank was lost ({first_line}); its machine's log may say more, "
                "and the same command resumes from the newest checkpoint"
            )
        return killed_worker(error, distributed.rank()) or error

    def _is_first(self) -> bool:
        """Whether no rank of this start has failed before, and no other start has begun.

        Of all ranks that share a folder one alone can rename the note of _begin, even if they
        fail at the same time.
        """
        try:
            os.rename(self._folder / f"{_BEGUN}{self._token}", self._folder / f"{_CAUSE}{self._token}")
        except FileNotFoundError:
            return not os.path.exists(self._folder)
        except OSError:  # the folder is gone or full: rather twice than never
            return True
        return True

    def write(self, state: State, reason: str = "") -> None:
        """Write the state of this start, which has not failed; rank 0 calls it."""
        write(self._folder, state, self.progress.step, self._total_steps, reason)


def read(run_dir: str | Path) -> dict[str, Any] | None:
    """The content of RUN/status.json; None if there is none, or none that can be read."""
    path = Path(run_dir) / STATUS_NAME
    try:
        status = json.loads(path.read_bytes())
        is_status = isinstance(status, dict) and isinstance(status.get("state"), str)
        if is_status and all(isinstance(status.get(key), int) for key in ("step", "total_steps")):
            return status
        problem = "what it holds is not the status of a run"
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    logger.warning("%s cannot be read (%s), and does not count", path, problem)
    return None


def has_diverged(run_dir: str | Path) -> bool:
    """Whether the last start of a run ended because the run diverged, by RUN/status.json."""
    status = read(run_dir)
    return bool(status and status.get("diverged"))


def written_at(status: Mapping[str, Any]) -> float:
    """When a status was written, in seconds since the epoch; infinity = it is not known."""
    try:
        return datetime.datetime.strptime(status["time"], TIME_FORMAT).timestamp()
    except (KeyError, TypeError, ValueError):
        return math.inf


def write(
    folder: Path,
    state: State,
    step: int,
    total_steps: int,
    reason: str,
    exit_status: int | None = None,
    *,
    diverged: bool = False,
) -> None:
    """Write RUN/status.json; the holder of the run's lock calls it, or a rank of its job.

    exit_status: None = the usual one of the state.
    """
    values = {
        "state": state,
        "step": step,
        "total_steps": total_steps,
        "reason": reason,
        "exit_status": _EXIT_STATUS[state] if exit_status is None else exit_status,
        "diverged": diverged,
        "time": time.strftime(TIME_FORMAT),
    }
    atomic.write(folder / STATUS_NAME, json.dumps(values, indent=1).encode() + b"\n")


def _is_shared(error: BaseException) -> bool:
    return isinstance(error, UserError) and error.shared


def _sentence(error: BaseException) -> str:
    if isinstance(error, (UserError, KeyboardInterrupt)):
        return str(error)
    return redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])
