"""One job in a run directory: a lock that the kernel releases when its holder dies."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
FILE_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Held by rank 0 from the start of a job to its end.

    A POSIX record lock: it works over NFS, child processes do not inherit it, and a lock of a process or node
    that died is free again (when the file server notices, for a node). The file's content only says who.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Take the lock. Raises ConfigError naming the holder if there is one, OSError if run_dir cannot be
        written.
        """
        self._path = Path(run_dir) / FILE_NAME
        self._file: IO[str] | None = None
        while not self._file:
            self._file = self._open()

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str] | None:
        """The locked file, or None if somebody removed it meanwhile."""
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock is held)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read()
            file.close()
            if error.errno in _HELD:
                raise ConfigError(self._refusal(holder)) from None
            logger.warning(
                "%s is on a file system without locks (%s): see to it that no second job uses this run "
                "directory",
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

    def _refusal(self, holder: str) -> str:
        try:
            who = json.loads(holder)
            text = f"process {who['process']} on {who['host']} since {who['since']}"
        except (ValueError, KeyError, TypeError):
            text = "another process"
        return (
            f"run_dir {self._path.parent} is in use by {text}; end that job first or choose another run_dir "
            "(if "
            f"its machine is gone for good: delete {self._path})"
        )
