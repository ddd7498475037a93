"""How a program ends: the same for each in launch/ and tools/.

Status 0 is success, 2 a mistake that the user can fix, printed as one sentence, and 1 a failure
without one: a rank that was lost, a store that does not answer, or our bug, which keeps its
traceback. Other statuses are the program's own. Nothing here takes long to import: Ctrl-C while
torch is imported ends a program as later.
"""

import contextlib
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn

from vitscale import slurm
from vitscale.errors import FAILED, MISTAKE, RankLost, Told, UserError, killed_worker, status_of
from vitscale.redaction import redact

NO_READER = 1


def run(program: Callable[[], int]) -> int:
    """Call the program and return its exit status; a user's mistake becomes a line on stderr.

    Under a launcher every rank calls it. Rank 0 alone prints an error that all ranks raise
    (UserError.shared); an error of a single rank is printed by that rank.
    """
    rank = 0
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets escapes, and no error
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(levelname)s %(message)s"))
    sys.excepthook = _print_traceback
    try:
        rank = int(slurm.launched().get("RANK", "0"))
        logging.basicConfig(level=logging.ERROR if rank else logging.INFO, handlers=[handler])
        return program()
    except UserError as error:
        if rank == 0 or not error.shared:
            print(f"error: {error}", file=sys.stderr)
        return status_of(error)
    except Told:
        return FAILED
    except RuntimeError as error:
        lost = killed_worker(error, rank) or _lost_rank(error, rank)
        if not lost:
            raise
        print(f"error: {lost}", file=sys.stderr)
        return lost.status
    except KeyboardInterrupt as error:
        print("stopped; nothing is left half written, and the same command continues", file=sys.stderr)
        return status_of(error)
    except BrokenPipeError:  # the reader of our output (head, less) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except OSError as error:
        if status_of(error) != MISTAKE:
            raise
        where = redact(str(error.filename or "writing"))
        print(
            f"error: {where}: {error.strerror}; "
            "fix the path, its permissions or the disk, and run the same command again",
            file=sys.stderr,
        )
        return MISTAKE
    finally:  # not before a mistake has been told: it may wait for other ranks
        if distributed := sys.modules.get("vitscale.distributed"):
            with contextlib.suppress(KeyboardInterrupt):
                distributed.shutdown()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a program: what they make is never searched for garbage.

    That would be a fifth of the time of a start: modules are no garbage, but Python looks for
    some as it imports them, and DeepSpeed six times as it starts an engine.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _lost_rank(error: RuntimeError, rank: int) -> RankLost | None:
    """What a user should read where a program loses another rank; None for any other error.

    In a run, Ending knows more.
    """
    distributed = sys.modules.get("vitscale.distributed")
    if not distributed or not distributed.lost_connection(error):
        return None
    text = redact(" ".join(str(error).split()))
    return RankLost(
        f"rank {rank} lost the connection to another rank, which has ended or does not answer ({text}); its "
        "log may say more, and the same command may succeed later"
    )


def leave(status: int) -> NoReturn:
    """End the process with a status; what cannot be printed any more changes nothing.

    Not by sys.exit(): about one exit in a hundred would end with SIGABRT in a thread of
    torch's, after all the work is done. And a failed rank must not wait for anything.
    """
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream:  # None: it was closed before the start
                stream.flush()
    finally:
        os._exit(status)


def _open_streams() -> None:
    """Open /dev/null as each standard stream that was closed before the start, as by a daemon.

    Python sets such a stream to None, and the next file takes its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, without the secrets of URLs."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), file=sys.stderr, end="", flush=True)


class _Redacting(logging.Formatter):
    """Formats log lines without the secrets of URLs, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
