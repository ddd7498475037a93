"""What is tried again, how often and after which pause, and what is not.

Exponential backoff with jitter. What keeps failing is a StoreDown, and is never taken for
missing data.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vitscale.errors import StoreDown, StoreError
from vitscale.redaction import redact

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 10
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.25, 30.0  # about a minute and a half in all
_NO_CREDENTIALS = {  # exceptions of botocore and google.auth
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}


def is_any(_: object) -> bool:
    return True


def retry(
    call: Callable[[], T],
    url: str,
    doing: str,
    *,
    way_out: Callable[[], str],
    is_right: Callable[[T], bool] = is_any,
    beyond_end: T | None = None,
    denial_may_pass: bool = False,
) -> T:
    """Call, and call again after transient errors; raise at once what waiting cannot fix.

    url, doing: for messages, like "s3://bucket/x.tar" and "reading". way_out: says what a user
    does who is denied access. is_right: a result for which it is False is an error of the
    store, but is returned if it is the last attempt's. beyond_end: what to return if the store
    says that the range is behind the object's end. denial_may_pass: call again after a denial
    of access, too.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            result = call()
            if is_right(result) or attempt == ATTEMPTS:
                return result
            problem = "it delivered wrong bytes"
        except Exception as error:
            if _is_beyond_end(error) and beyond_end is not None:
                return beyond_end
            if attempt == ATTEMPTS or not (denial_may_pass and _is_denial(error)):
                _raise_if_final(error, url, doing, way_out)
            if attempt == ATTEMPTS:
                raise StoreDown(
                    f"{doing} {url} failed {ATTEMPTS} times, the last time with: {_text(error)}; "
                    "run the same command again when the store answers"
                ) from None
            problem = _text(error)
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1))
        delay *= 0.5 + random.random()
        log = logger.warning if attempt > 2 else logger.info
        log("%s %s failed (%s); attempt %d in %.1f s", doing, url, problem, attempt + 1, delay)
        time.sleep(delay)
    raise AssertionError("unreachable")


def _raise_if_final(error: Exception, url: str, doing: str, way_out: Callable[[], str]) -> None:
    """Raise what a user must fix and what is no store's error; return if it may pass."""
    status = _status(error)
    if status == 404 or (isinstance(error, FileNotFoundError) and not _hides_another(error)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    if _lacks_credentials(error):
        raise StoreError(f"{doing} {url}: there are no credentials ({_text(error)}); {way_out()}") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise StoreError(f"{doing} {url}: access is denied ({_text(error)}); {way_out()}") from None
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        raise StoreError(f"{doing} {url}: the server answers {_text(error)}; check the URL") from None
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and library not in ("aiohttp", "botocore", "gcsfs", "requests"):
        raise error
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        raise StoreError(f"{doing} {url}: {_text(error)}; name a file") from None


def _status(error: Exception) -> int | None:
    return getattr(error, "status", None) or getattr(error.__cause__, "status", None)


def _lacks_credentials(error: Exception) -> bool:
    return bool({type(error).__name__, type(error.__cause__).__name__} & _NO_CREDENTIALS)


def _is_denial(error: Exception) -> bool:
    """400 is what S3 answers to half a signature."""
    return (
        isinstance(error, PermissionError) or _lacks_credentials(error) or _status(error) in (400, 401, 403)
    )


def _hides_another(error: FileNotFoundError) -> bool:
    """fsspec's HTTP reports any failed look-up as a missing file; the cause is what it was."""
    return type(error.__cause__).__module__.partition(".")[0] == "aiohttp"


def _is_beyond_end(error: Exception) -> bool:
    return getattr(error, "status", None) == 416 or (
        isinstance(error, OSError) and error.errno == errno.EINVAL and "InvalidRange" in str(error)
    )


def _text(error: BaseException) -> str:
    """An error's kind and first line, for messages."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return redact(f"{type(cause).__name__}: {cause}").splitlines()[0].rstrip(": ")
