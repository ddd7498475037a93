"""Files and folders that one command at a time works on, while others are refused."""

import fcntl
import time

from vitscale.errors import BusyError

_WAIT_SECONDS = 5  # the last process of a killed command may hold the lock a moment longer


def hold(descriptor: int, refusal: str) -> None:
    """Lock an open file or folder until it is closed. Raises BusyError(refusal)."""
    # flock, not lockf as for a run directory: forked workers inherit it, so it stays locked
    # while a worker of a killed command still writes. The kernel unlocks it after the last.
    deadline = time.monotonic() + _WAIT_SECONDS
    while not _try(descriptor):
        if time.monotonic() > deadline:
            raise BusyError(refusal)
        time.sleep(0.05)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: the command continues without one
    return True
