"""How a program ends: the same for every program in launch/ and tools/.

Status 0 is success, 2 a mistake that the user can fix, printed as one sentence, and 1 a failure
without one: a rank that was lost, a store that does not answer, or our bug, which keeps its
traceback. Other statuses are the program's own.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from vitscale import distributed
from vitscale.errors import FAILED, MISTAKE, Told, UserError, killed_worker, status_of
from vitscale.redaction import redact

NO_READER = 1


def run(program: Callable[[], int]) -> int:
    """Call the program and return its exit status; a user's mistake becomes a line on stderr.

    Under a launcher every rank calls it. Rank 0 alone prints an error that all ranks raise
    (UserError.shared); an error of a single rank is printed by that rank.
    """
    rank = distributed.launched_rank()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(levelname)s %(message)s"))
    sys.excepthook = _print_traceback
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, handlers=[handler])
    try:
        return program()
    except UserError as error:
        if rank == 0 or not error.shared:
            print(f"error: {error}", file=sys.stderr)
        return status_of(error)
    except Told:
        return FAILED
    except RuntimeError as error:
        killed = killed_worker(error, rank)
        if not killed:
            raise
        print(f"error: {killed}", file=sys.stderr)
        return killed.status
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
    finally:
        distributed.shutdown()


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, without the secrets of URLs."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), file=sys.stderr, end="", flush=True)


class _Redacting(logging.Formatter):
    """Formats log lines without the secrets of URLs, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
