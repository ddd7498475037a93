"""Bytes by URL: local files and fsspec's stores, through one small set of functions.

Only SCHEMES are opened: a shard is data, never code, so `pipe:` and the like are refused before
any library sees them. Transient errors are retried here and only here (attempts.py): the
clients' own retries, which would multiply with ours, are switched off. Where the caller knows
what the bytes must be, wrong ones are a transient error too.

The query of an HTTP URL may be a secret (a signature). It is never written or printed: what
reads such a URL later finds it in the file that URLS_VARIABLE names.
"""

import collections
import errno
import functools
import glob
import io
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from braceexpand import braceexpand

from vitscale.errors import ConfigError, StoreError
from vitscale.redaction import redact
from vitscale.stores import attempts
from vitscale.stores.clients import client

T = TypeVar("T")

SCHEMES = ("file", "http", "https", "s3", "gs", "gcs")
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
LOOKUP_THREADS = 32
STREAM_STEP_BYTES = 8 << 20

URLS_VARIABLE = "VITSCALE_URLS"

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), "
    "and AWS_ENDPOINT_URL for a store that is not Amazon's, on every node",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login, on every node",
    "http": "the server must let this machine read it; for URLs with a signature, name a file of "
    f"fresh ones, one per line, with {URLS_VARIABLE}",
}


def expand(pattern: str) -> list[str]:
    """The sorted URLs that a glob, a brace pattern ({000..127}) or a plain URL names.

    A local path that exists is that file, whatever its name. A remote pattern names its shards
    by braces, which needs no permission to list, or by `*` where the store can list. Raises
    ConfigError if there are none.
    """
    urls: set[str] = set()
    try:
        expanded = braceexpand(pattern)
    except ValueError:  # braces that are not closed
        raise ConfigError(
            f"{pattern!r} has a brace without its other half; write pairs, like {{000..127}}"
        ) from None
    for url in expanded:
        if any(c in url for c in "*?[") and is_local(url):
            path = local_path(url)
            urls.update([path] if os.path.lexists(path) else glob.glob(path, recursive=True))
        elif any(c in without_query(url) for c in "*["):
            urls.update(_on_store(lambda fs, path: map(fs.unstrip_protocol, fs.glob(path)), url, "listing"))
        else:
            urls.add(url)
    if not urls:
        hint = "; write [[] for each [ in the name of a folder" if "[" in pattern else ""
        raise ConfigError(
            f"no file matches {pattern!r}; check the path, and quote it if your shell expands patterns{hint}"
        )
    return sorted(urls)


def scheme(url: str) -> str:
    """The scheme of a URL, "file" for a path. Raises ConfigError for one not in SCHEMES."""
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", url)
    name = match.group(1).lower() if match else "file"
    if name not in SCHEMES:
        raise ConfigError(
            f"{url!r}: the scheme {name}: is not allowed; use a path or one of {', '.join(SCHEMES)}"
        )
    return name


def without_query(url: str) -> str:
    """The URL as it may be written down: over HTTP, without user, query and fragment."""
    if scheme(url) not in ("http", "https"):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_local(url: str) -> bool:
    return scheme(url) == "file"


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def local_output(out: str | Path) -> Path:
    """The path of a file or folder to write. Raises ConfigError for one in a store."""
    if not is_local(str(out)):
        raise ConfigError(f"{out} is in a store: write to a local folder, and upload it from there")
    return Path(local_path(str(out)))


def absolute(url: str) -> str:
    """What names the same file from any working directory: a URL does as it is."""
    return url if "://" in url else os.path.abspath(url)


def join(base: str, name: str) -> str:
    """`name` relative to the folder of `base`; an absolute path or a URL is left as it is."""
    if os.path.isabs(name) or re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", name):
        return name
    folder, slash, _ = without_query(base).rpartition("/")
    return f"{folder}/{name}" if slash else name


def child(folder: str | Path, name: str) -> str:
    """The URL of `name` in a folder or below a store's prefix."""
    return f"{str(folder).rstrip('/')}/{name}"


def read_bytes(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError if there is none."""
    if is_local(url):
        return Path(local_path(url)).read_bytes()
    return _on_store(lambda fs, path: fs.cat_file(path), url, "reading")


def read_range(url: str, start: int, end: int, is_right: Callable[[bytes], bool] = attempts.is_any) -> bytes:
    """Bytes [start, end) of the object, fewer if it ends before.

    is_right: bytes for which it is False are read again: from a disk once, from a store as
    after an error. Those that are still wrong after the last attempt are returned. Raises
    FileNotFoundError if there is no object.
    """
    if is_local(url):
        data = _read_local(url, start, end)
        return data if is_right(data) else _read_local(url, start, end)
    data = _on_store(
        lambda fs, path: fs.cat_file(path, start=start, end=end),
        url,
        "reading",
        is_right=is_right,
        beyond_end=b"",
    )
    if len(data) > end - start:
        raise StoreError(
            f"{url}: the server ignores range requests (asked for {end - start:,} bytes, it sent "
            f"{len(data):,}); serve the shards with one that does not, or copy them to a local disk"
        )
    return data


def _read_local(url: str, start: int, end: int) -> bytes:
    return attempts.retry(
        lambda: _pread(local_path(url), start, end),
        redact(url),
        "reading",
        way_out=lambda: _way_to_access(url),
    )


def open_stream(url: str) -> io.BufferedReader:
    """The object as a stream of bytes, for one pass over it."""
    if is_local(url):
        return open(local_path(url), "rb")
    return io.BufferedReader(_RangeFile(url), STREAM_STEP_BYTES)


def names_in(folder: str) -> list[str]:
    """The sorted names directly in a folder or below a store's prefix; [] if there is none."""
    try:
        if is_local(folder):
            return sorted(os.listdir(local_path(folder)))
        _filesystem(folder)[0].invalidate_cache()
        names = _on_store(lambda fs, path: fs.ls(path, detail=False), folder, "listing")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in names} - {""})


def upload(path: str | Path, url: str) -> None:
    """Copy a local file into a store. Raises StoreError if the copy's size differs."""
    _on_store(lambda fs, remote: fs.put_file(str(path), remote), url, "writing", writes=True)
    _filesystem(url)[0].invalidate_cache()
    written, expected = _size(url), os.stat(path).st_size
    if written != expected:
        raise StoreError(f"{url} has {written} bytes after {expected:,} were written; is the store full?")


def write_bytes(url: str, data: bytes) -> None:
    """Put an object into a store, whole or not at all."""
    _on_store(lambda fs, path: fs.pipe_file(path, data), url, "writing", writes=True)


def delete(url: str) -> None:
    """Delete an object, or all below a store's prefix. It is no error if there is nothing."""
    _filesystem(url)[0].invalidate_cache()
    try:
        _on_store(lambda fs, path: fs.rm(path, recursive=True), url, "deleting", writes=True)
    except FileNotFoundError:
        return


def connect(url: str) -> None:
    """Make the client of the URL's store in this process, before threads that would race to."""
    if not is_local(url):
        _filesystem(url)


def sizes(urls: Sequence[str]) -> list[int | None]:
    """The size of each object in bytes, None where there is none; remote ones in parallel."""
    return _look_up(_size, urls)


def versions(urls: Sequence[str]) -> list[str]:
    """What changes with each object's content, "" where there is none; remote ones in parallel.

    It holds the size, and the time of a local file or what a store has: a tag or a time.
    """
    return _look_up(_version, urls)


def written_at(url: str) -> float:
    """When an object in a store was written: seconds since the epoch, by the store's clock."""
    return _on_store(lambda fs, path: fs.modified(path), url, "looking up").timestamp()


class _RangeFile(io.RawIOBase):
    """A remote object as a file to be read from start to end. Each range is retried alone."""

    def __init__(self, url: str) -> None:
        size = _size(url)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redact(url))
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


def _look_up(function: Callable[[str], T], urls: Sequence[str]) -> list[T]:
    """function(url) of each, in parallel if one is remote."""
    if all(map(is_local, urls)):
        return [function(url) for url in urls]
    for url in {scheme(_full_url(url)): url for url in urls}.values():
        connect(url)
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(function, urls))


def _size(url: str) -> int | None:
    try:
        if is_local(url):
            return os.stat(local_path(url)).st_size
        return int(_on_store(lambda fs, path: fs.size(path), url, "looking up"))
    except FileNotFoundError:
        return None


def _version(url: str) -> str:
    try:
        if is_local(url):
            file = os.stat(local_path(url))
            return f"{file.st_size} {file.st_mtime_ns}"
        info = _on_store(lambda fs, path: fs.info(path), url, "looking up")
    except FileNotFoundError:
        return ""
    return " ".join(str(info[name]) for name in ("size", "ETag", "etag", "Last-Modified") if name in info)


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    url = _full_url(url)
    name = scheme(url)
    try:
        fs = client(name, os.getpid(), "?" in url)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; run: pip install 'vitscale[{EXTRAS[name]}]'") from None
    except ValueError as error:
        raise StoreError(f"{url}: {error}; check the URL and AWS_ENDPOINT_URL") from None
    return fs, fs._strip_protocol(url)


def _full_url(url: str) -> str:
    """The URL that the file named by URLS_VARIABLE has for a remote one, if it has one.

    It is the line with the same host and path, else with the same path, else with bucket and
    path as its path.
    """
    path = os.environ.get(URLS_VARIABLE)
    if not path or is_local(url):
        return url
    try:
        file = os.stat(path)
        by_place = _read_urls(path, (file.st_mtime_ns, file.st_size, file.st_ino))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{URLS_VARIABLE} names {path}, which cannot be read ({error}); write one URL per line"
        ) from None
    place = urlsplit(url)
    candidates = (without_query(url), place.path, f"/{place.netloc}{place.path}")
    return next((by_place[candidate] for candidate in candidates if candidate in by_place), url)


@functools.lru_cache(maxsize=1)
def _read_urls(path: str, version: tuple[int, ...]) -> dict[str, str]:
    """The URLs of a file by their places: host with path, and path alone where it is unique.

    Of several lines with the same host and path, the last counts.
    """
    urls = map(str.strip, Path(path).read_text().splitlines())
    by_place = {without_query(url): url for url in urls if url}
    num_hosts = collections.Counter(urlsplit(place).path for place in by_place)
    by_path = {path: url for place, url in by_place.items() if num_hosts[path := urlsplit(place).path] == 1}
    return by_path | by_place


def _on_store(
    call: Callable[[Any, str], T],
    url: str,
    doing: str,
    *,
    is_right: Callable[[T], bool] = attempts.is_any,
    beyond_end: T | None = None,
    writes: bool = False,
) -> T:
    """call(file system, path) as attempts.retry does, each time with the URL as it is then.

    Where URLS_VARIABLE is set, a denial to read may pass: its file may be replaced meanwhile.
    """
    return attempts.retry(
        lambda: call(*_filesystem(url)),
        redact(url),
        doing,
        way_out=lambda: _way_to_access(url),
        is_right=is_right,
        beyond_end=beyond_end,
        denial_may_pass=bool(os.environ.get(URLS_VARIABLE)) and not writes,
    )


def _way_to_access(url: str) -> str:
    """What gives this process access to a URL that it was denied."""
    if _full_url(url) != url:
        return f"refresh the URLs in {os.environ[URLS_VARIABLE]}, which {URLS_VARIABLE} names"
    name = scheme(url)
    return CREDENTIALS.get({"gcs": "gs", "https": "http"}.get(name, name), "")
