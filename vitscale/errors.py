"""The errors that a user can cause and can fix, by kind.

Every message is one sentence that says what is wrong, where, which rule it breaks, and what to
write instead. command.py prints it. Only our own bugs end with a traceback.
"""

import errno

from vitscale.redaction import redact

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
PREEMPTED = 75  # stopped after a clean save: start it again
# What a disk, a path or a limit refuses: the user fixes it outside of the program.
_USERS_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE,
)  # fmt: skip


class UserError(ValueError):
    """The base of all kinds: a program prints the message and exits with status 2.

    shared: every rank raises it with the same message, so that rank 0 alone prints it.
    status: the exit status of a program that it ends.
    The secrets in URLs are taken out of the message.
    """

    status = MISTAKE

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(redact(message))
        self.shared = shared


class ConfigError(UserError):
    """A config file, an override or an option that cannot be used as written."""


class DataError(UserError):
    """Shards, an index, a list or an image source that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, an export or another library's weights that cannot be read or written."""


class StoreError(UserError):
    """A store or a disk that refuses or does not answer, whatever it may hold."""


class StoreDown(StoreError):
    """A store that failed each time that a call was repeated; later it may answer."""

    status = FAILED


class BusyError(UserError):
    """Something that another process holds, or a process of a tool that was killed."""


class Diverged(UserError):
    """A run whose losses or gradients are no longer finite."""


class NotFinite(UserError):
    """Features or logits of a model that are not finite, so that nothing can be scored."""


class RankLost(UserError):
    """A rank, or a data worker, that is dead or does not answer, though all may be right."""

    status = FAILED


def killed_worker(error: BaseException, rank: int) -> RankLost | None:
    """What a user should read in place of torch's error for a data worker that is dead.

    torch raises it wherever the rank happens to be. None for any other error.
    """
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
        return None
    return RankLost(
        f"a data worker of rank {rank} was killed, probably for lack of memory; lower num_workers, and run "
        "the same command again"
    )


class Told(Exception):
    """Raised on a rank that fails because another one did, which has printed the cause."""


class Terminated(KeyboardInterrupt):
    """A SIGTERM, where it ends a program as Ctrl-C does, after what it has started."""


def status_of(error: BaseException) -> int:
    """The exit status of a program that an error ends."""
    if isinstance(error, UserError):
        return error.status
    if isinstance(error, Terminated):
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISTAKE if isinstance(error, OSError) and error.errno in _USERS_ERRNOS else FAILED
