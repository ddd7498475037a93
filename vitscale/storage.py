"""Bytes by name: local files and the stores that fsspec speaks, through one small set of functions.

Only these schemes are opened: a shard is data, never code, so `pipe:` and the like are refused before any
library sees them. Transient errors are retried with exponential backoff and jitter, here and only here: the
clients' own retries, which would multiply with ours, are switched off. What stays broken is a StoreError,
never data that are missing.
"""

import errno
import functools
import glob
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from braceexpand import braceexpand

from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("file", "http", "https", "s3", "gs", "gcs")
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
ATTEMPTS = 10
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.25, 30.0  # about a minute and a half in all
CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 10, 30
LOOKUP_THREADS = 32
STREAM_STEP_BYTES = 8 << 20

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL for "
    "a store that is not Amazon's, on every node",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login, on every node",
    "http": "the server must let this machine read it",
}


class StoreError(ConfigError):
    """A store, or a disk, that refuses or does not answer; nothing is said about what it holds."""


def expand(pattern: str) -> list[str]:
    """The sorted URLs that a glob, a brace pattern ({000..127}) or a plain URL names. Raises ConfigError if
    there are none.

    A remote pattern lists its shards by braces, which needs no listing permission, or by `*` where the store
    can list.
    """
    urls: set[str] = set()
    try:
        expanded = braceexpand(pattern)
    except ValueError:  # braces that are not closed
        raise ConfigError(
            f"{pattern!r} has a brace without its other half; write one like {{000..127}}"
        ) from None
    for url in expanded:
        if any(c in url for c in "*?[") and is_local(url):
            urls.update(glob.glob(local_path(url), recursive=True))
        elif any(c in url for c in "*["):
            fs, path = _filesystem(url)
            found = _retry(functools.partial(fs.glob, path), url, "listing")
            urls.update(map(fs.unstrip_protocol, found))
        else:
            urls.add(url)
    if not urls:
        raise ConfigError(
            f"no file matches {pattern!r}; check the path (quote patterns so that the shell leaves them "
            "alone)"
        )
    return sorted(urls)


def scheme(url: str) -> str:
    """The scheme of a URL ("file" for a plain path). Raises ConfigError for one that is not allowed."""
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", url)
    name = match.group(1).lower() if match else "file"
    if name not in SCHEMES:
        raise ConfigError(
            f"{url!r}: the scheme {name}: is not allowed; use a path or one of {', '.join(SCHEMES)}"
        )
    return name


def is_local(url: str) -> bool:
    return scheme(url) == "file"


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def join(base: str, name: str) -> str:
    """`name` relative to the folder of `base`; an absolute path or URL stays as it is."""
    if os.path.isabs(name) or re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", name):
        return name
    return f"{base.rpartition('/')[0]}/{name}" if "/" in base else name


def child(folder: str | Path, name: str) -> str:
    """The URL of `name` in a folder or below a store's prefix."""
    return f"{str(folder).rstrip('/')}/{name}"


def read_bytes(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError if there is none."""
    if is_local(url):
        return Path(local_path(url)).read_bytes()
    fs, path = _filesystem(url)
    return _retry(lambda: fs.cat_file(path), url, "reading")


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of the object; fewer where it ends before. Raises FileNotFoundError if there is
    none.
    """
    if is_local(url):
        return _retry(lambda: _pread(local_path(url), start, end), url, "reading")
    fs, path = _filesystem(url)
    data = _retry(lambda: fs.cat_file(path, start=start, end=end), url, "reading", beyond_end=b"")
    if len(data) > end - start:
        raise StoreError(
            f"{url}: the server ignores range requests (asked for {end - start:,} bytes, it sent "
            f"{len(data):,}); serve the shards with one that does not, or copy them to a local disk"
        )
    return data


def open_stream(url: str) -> io.BufferedReader:
    """The object as a sequential stream of bytes, for one pass over it."""
    if is_local(url):
        return open(local_path(url), "rb")
    return io.BufferedReader(_RangeFile(url), STREAM_STEP_BYTES)


def names_in(folder: str) -> list[str]:
    """The names directly in a folder or below a store's prefix, sorted; none where there is no such place."""
    try:
        if is_local(folder):
            return sorted(os.listdir(local_path(folder)))
        fs, path = _filesystem(folder)
        fs.invalidate_cache()
        found = _retry(lambda: fs.ls(path, detail=False), folder, "listing")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in found} - {""})


def upload(path: str | Path, url: str) -> None:
    """Copy a local file into a store. Raises StoreError if what lies there then is not as long."""
    fs, remote = _filesystem(url)
    _retry(lambda: fs.put_file(str(path), remote), url, "writing")
    fs.invalidate_cache()
    written, expected = _size(url), os.stat(path).st_size
    if written != expected:
        raise StoreError(f"{url} has {written} bytes after {expected:,} were written; is the store full?")


def write_bytes(url: str, data: bytes) -> None:
    """Put an object into a store, whole or not at all."""
    fs, path = _filesystem(url)
    _retry(lambda: fs.pipe_file(path, data), url, "writing")


def delete(url: str) -> None:
    """Delete an object, or all that lies below a store's prefix; what is not there is no error."""
    fs, path = _filesystem(url)
    fs.invalidate_cache()
    try:
        _retry(lambda: fs.rm(path, recursive=True), url, "deleting")
    except FileNotFoundError:
        return


def connect(url: str) -> None:
    """Make the client of the URL's store in this process: two threads must not make it at once."""
    if not is_local(url):
        _filesystem(url)


def sizes(urls: Sequence[str]) -> list[int | None]:
    """The size of each object in bytes, None where there is none. Remote ones are asked for in parallel."""
    if all(map(is_local, urls)):
        return [_size(url) for url in urls]
    for url in {scheme(url): url for url in urls}.values():
        connect(url)
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(_size, urls))


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a local file so that a kill at any instant leaves the old content or the new one, on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: str | Path) -> None:
    """Make the names in a local directory durable (renames and new files)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RangeFile(io.RawIOBase):
    """A remote object as a file to be read from end to end, in ranges each of which is retried by itself."""

    def __init__(self, url: str) -> None:
        size = _size(url)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._size, self._at + len(buffer))
        data = read_range(self._url, self._at, end) if self._at < end else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _pread(path: str, start: int, end: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), end - start, start)


def _size(url: str) -> int | None:
    try:
        if is_local(url):
            return os.stat(local_path(url)).st_size
        fs, path = _filesystem(url)
        return int(_retry(lambda: fs.size(path), url, "looking up"))
    except FileNotFoundError:
        return None


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    name = scheme(url)
    try:
        fs = client(name, os.getpid())
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; run: pip install 'vitscale[{EXTRAS[name]}]'") from None
    except ValueError as error:
        raise StoreError(f"{url}: {error}; check the URL and AWS_ENDPOINT_URL") from None
    return fs, fs._strip_protocol(url)


@functools.cache
def client(name: str, process: int) -> Any:
    """The fsspec file system of a scheme in one process.

    A client does not survive a fork, so every process makes its own. A worker keeps its parent's, too,
    unused:
    finalising it would take the parent's open connections out of the epoll set that the two share, and the
    parent would wait for answers until its time-out.
    """
    fs = fsspec.filesystem(name, skip_instance_cache=True, **_client_options(name))
    fs.retries = 1
    return fs


def _client_options(name: str) -> dict[str, Any]:
    if name == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS}
        # Our own checksums go with all that we write; the client's are wrong for ranges at some servers.
        checksums = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        return {"config_kwargs": {"retries": {"max_attempts": 0}, **timeouts, **checksums}}
    if name in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS
        )
        return {"client_kwargs": {"timeout": timeout}}
    return {}


def _retry(call: Callable[[], T], url: str, doing: str, *, beyond_end: T | None = None) -> T:
    """Call, and again after transient errors; what cannot get better by waiting is raised at once.

    beyond_end: what to return where the store says that the range lies behind the object's end.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if _is_beyond_end(error) and beyond_end is not None:
                return beyond_end
            _raise_if_final(error, url, doing)
            if attempt == ATTEMPTS:
                raise StoreError(
                    f"{doing} {url} failed {ATTEMPTS} times, the last time with: {_text(error)}; when the "
                    "store answers again, the same command goes on"
                ) from None
            delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1))
            delay *= 0.5 + random.random()
            log = logger.warning if attempt > 2 else logger.info
            log("%s %s failed (%s); attempt %d in %.1f s", doing, url, _text(error), attempt + 1, delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _raise_if_final(error: Exception, url: str, doing: str) -> None:
    """Raise what a user must mend, and what is not a store's error at all; return for what may pass."""
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    kinds = {type(error).__name__, type(error.__cause__).__name__}
    way_out = CREDENTIALS.get({"gcs": "gs", "https": "http"}.get(scheme(url), scheme(url)), "")
    if status == 404 or (isinstance(error, FileNotFoundError) and not _hides_another(error)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    if kinds & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "DefaultCredentialsError",
    }:
        raise StoreError(f"{doing} {url}: there are no credentials ({_text(error)}); {way_out}") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise StoreError(f"{doing} {url}: access is denied ({_text(error)}); {way_out}") from None
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        raise StoreError(f"{doing} {url}: the server answers {_text(error)}; check the URL") from None
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and library not in ("aiohttp", "botocore", "gcsfs", "requests"):
        raise error
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        raise StoreError(f"{doing} {url}: {_text(error)}; name a file") from None


def _hides_another(error: FileNotFoundError) -> bool:
    """fsspec's http tells every failed look-up as a missing file; the cause says what it was."""
    return type(error.__cause__).__module__.partition(".")[0] == "aiohttp"


def _is_beyond_end(error: Exception) -> bool:
    return getattr(error, "status", None) == 416 or (
        isinstance(error, OSError) and error.errno == errno.EINVAL and "InvalidRange" in str(error)
    )


def _text(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": ")
