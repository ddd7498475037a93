"""Who holds a run directory: one job at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from vitscale.errors import BusyError

logger = logging.getLogger(__name__)
LOCK_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Held by rank 0 from the start of a job to its end.

    A POSIX record lock: it works over NFS, child processes do not inherit it, and it is free
    again when its process dies (or its node, once the file server notices). The content of the
    file only says who holds it.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Take the lock.

        Raises BusyError naming the holder if there is one, and OSError if it cannot be written.
        """
        self._path = Path(run_dir) / LOCK_NAME
        self._file: IO[str] | None = None
        while not self._file:
            self._file = self._open()

    @classmethod
    def check(cls, run_dir: str | Path) -> None:
        """Raise BusyError naming the holder if there is one, without taking the lock.

        Not for the holder's process: closing the file there would free its lock.
        """
        path = Path(run_dir) / LOCK_NAME
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # beside others that look
            except OSError as error:
                if error.errno in _HELD:
                    raise BusyError(_refusal(path, file.read())) from None

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str] | None:
        """The locked file, or None if somebody removed it before it was locked."""
        file = open(self._path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read()
            file.close()
            if error.errno in _HELD:
                raise BusyError(_refusal(self._path, holder)) from None
            logger.warning(
                "%s is on a file system without locks (%s): "
                "make sure that no second job uses this run directory",
                self._path,
                error.strerror,
            )
            return open(self._path, "a+", encoding="utf-8")
        if not self._path.exists() or os.fstat(file.fileno()).st_ino != self._path.stat().st_ino:
            file.close()
            return None
        file.truncate(0)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T %z")}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        return file


def _refusal(path: Path, holder: str) -> str:
    try:
        values = json.loads(holder)
        who = f"process {values['process']} on {values['host']} since {values['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        who = "another process"
    return (
        f"run_dir {path.parent} is in use by {who}; end that job first or choose another run_dir (if its "
        f"machine is gone for good, delete {path})"
    )
