"""Bytes by name: local files and the stores that fsspec speaks, through one small set of functions.

Only these schemes are opened: a shard is data, never code, so `pipe:` and the like are refused before any
library sees them. Transient errors of remote stores are retried with exponential backoff and jitter.
"""

import glob
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from braceexpand import braceexpand

from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("file", "http", "https", "s3", "gs", "gcs")
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
ATTEMPTS = 5
FIRST_DELAY_SECONDS = 0.5


def expand(pattern: str) -> list[str]:
    """The sorted URLs that a glob, a brace pattern ({000..127}) or a plain URL names. Raises ConfigError if
    there are none.

    Only local patterns may contain `*`; a remote pattern lists its shards by braces, which needs no listing
    permission.
    """
    urls: set[str] = set()
    for url in braceexpand(pattern):
        if any(c in url for c in "*?[") and is_local(url):
            urls.update(glob.glob(local_path(url)))
        elif any(c in url for c in "*["):
            fs, path = fsspec.core.url_to_fs(url)
            urls.update(fs.unstrip_protocol(match) for match in fs.glob(path))
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


def read_bytes(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError if there is none."""
    if is_local(url):
        return Path(local_path(url)).read_bytes()
    fs, path = _filesystem(url)
    return _retry(lambda: fs.cat_file(path), f"reading {url}")


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of the object; fewer where it ends before. Raises FileNotFoundError if there is
    none.
    """
    if is_local(url):
        with open(local_path(url), "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)
    fs, path = _filesystem(url)
    return _retry(lambda: fs.cat_file(path, start=start, end=end), f"reading {url} [{start}:{end}]")


def open_stream(url: str) -> BinaryIO:
    """The object as a sequential stream of bytes, for one pass over it."""
    if is_local(url):
        return open(local_path(url), "rb")
    fs, path = _filesystem(url)
    return _retry(lambda: fs.open(path, "rb", block_size=8 << 20, cache_type="readahead"), f"opening {url}")


def size(url: str) -> int:
    """The object's size in bytes. Raises FileNotFoundError if there is none."""
    if is_local(url):
        return os.stat(local_path(url)).st_size
    fs, path = _filesystem(url)
    return int(_retry(lambda: fs.size(path), f"looking up {url}"))


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a local file so that a kill at any instant leaves the old content or the new one, on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def fsync_directory(path: str | Path) -> None:
    """Make the names in a local directory durable (renames and new files)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _filesystem(url: str) -> tuple[Any, str]:
    name = scheme(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(name)
        way_out = f"pip install 'vitscale[{extra}]'" if extra else "pip install aiohttp requests"
        raise ConfigError(f"{url}: {error}; run: {way_out}") from None


def _retry(call: Callable[[], T], what: str) -> T:
    """Call, and again after transient errors. What cannot get better by waiting is raised at once."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except (OSError, TimeoutError) as error:
            if attempt == ATTEMPTS:
                raise
            delay = FIRST_DELAY_SECONDS * 2 ** (attempt - 1) * (0.5 + random.random())
            logger.warning(
                "%s failed (%s); attempt %d of %d in %.1f s", what, error, attempt + 1, ATTEMPTS, delay
            )
            time.sleep(delay)
    raise AssertionError("unreachable")
