"""Local files and folders that appear under their names whole and on disk, or not at all.

A kill at any instant leaves either the old content or the new. At worst a temporary file or
folder stays behind, whose name begins with a dot and ends in `.tmp-TOKEN`. The token is random:
containers on several hosts that write the same path have the same process ids.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vitscale.errors import ConfigError, StoreError, UserError

T = TypeVar("T")
Rename = Callable[[Path, Path], None]


@contextlib.contextmanager
def appearing(path: str | Path, rename: Rename = os.replace) -> Iterator[Path]:
    """A temporary path beside `path`, for the block to write to; it then takes the name `path`.

    The block may write a file or a folder; it must sync the files in a folder itself. If it
    ends without an exception, the temporary path is synced and renamed. rename(temporary, path)
    does the renaming; what it leaves at the temporary path is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary)
        rename(temporary, path)
    finally:
        remove(temporary)
    sync_folder(path.parent)


def write(path: str | Path, data: bytes) -> None:
    """Write a file that is on disk on return. A kill leaves the old content or the new."""
    with named(path), appearing(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: str | Path, parse: Callable[[Any], T], remedy: str) -> T:
    """What `parse` makes of a JSON file that `write` wrote.

    parse may raise what a missing key or a value of another type does. Raises UserError with
    the `remedy` for a file that a disk or a hand has damaged, and OSError.
    """
    try:
        return parse(json.loads(Path(path).read_bytes()))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version; {remedy}") from None


def check_writable(path: str | Path, ending: str) -> None:
    """Make the folder of an output file, and try it, before any long work.

    ending: of all such files, like ".json": another file would be lost. Raises StoreError for
    what cannot be written, ConfigError for a folder or a name without that ending.
    """
    path = Path(path)
    with _refused(path, "name another file"):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file in it, like {path / f'out{ending}'}")
        if path.suffix != ending:
            raise ConfigError(f"{path} does not end in {ending}; name a file that does")
        if path.exists() and not os.access(path, os.W_OK):
            raise StoreError(f"{path} cannot be written; name another file")
        _try_folder(path.parent, path.name)


def check_folder(path: str | Path) -> None:
    """Make a folder for output, and try it. Raises StoreError if it cannot be written."""
    with _refused(Path(path), "name another folder"):
        _try_folder(Path(path), "")


def clean(path: str | Path) -> None:
    """Delete what killed processes left of `path` beside it; nobody may be writing it."""
    for leftover in Path(path).parent.glob(f".{Path(path).name}.tmp-*"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Within the block, an OSError without a file name gets this one: write() knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder durable: new files and renames."""
    _sync(Path(path))


def _sync(path: Path) -> None:
    """Sync a file or a folder. Some file systems sync no folders, and refuse to be asked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _refused(path: Path, way_out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); {way_out}") from None


def _try_folder(folder: Path, name: str) -> None:
    """Raise OSError unless the folder is there, or can be made, and takes a file of the name.

    Permissions do not tell: root has all of them in /proc.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.tmp-"):
        return


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file or a folder, if it is there; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)
