"""Files and folders that appear under their name whole or not at all, and never in the place of another's.

A kill at any instant leaves what was there before, or the new; at worst a temporary name, which begins with a
dot, stays behind.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitscale import storage
from vitscale.checkpoint.foreign.npz import NpzReader
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.weights import EXPORT_NAME, INDEX_NAME, Weights

_FOLDER_FILES = (EXPORT_NAME, INDEX_NAME, "config.json", "preprocessor_config.json")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A temporary path beside `out`, to write a file or a folder to, durably: when the block ends it becomes
    `out`, if need be in the place of an earlier export.

    Raises CheckpointError, before the block, if `out` is something else than an export of ours.
    """
    out = out.resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            storage.fsync_directory(temporary)
        _replace(temporary, out)
        storage.fsync_directory(out.parent)
    finally:
        _remove(temporary)


def _check_replaceable(out: Path) -> None:
    """Raise CheckpointError unless `out` is free, an empty folder, or an earlier export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir():
        shards = {path.name for path in out.glob("model-*-of-*.safetensors")}
        other = sorted({path.name for path in out.iterdir()} - shards - set(_FOLDER_FILES))
        found = [out / name for name in (EXPORT_NAME, INDEX_NAME) if (out / name).is_file()]
        if other or not found or not _is_ours(found[0]):
            reason = f"{other[0]} lies in it" if other else "its weights are not an export of vitscale"
            raise CheckpointError(f"{out} is not replaced: {reason}; name a new folder")
    elif not _is_ours(out):
        raise CheckpointError(f"{out} is not replaced: it is not an export of vitscale; name a new file")


def _is_ours(path: Path) -> bool:
    try:
        metadata = NpzReader(path).metadata if path.suffix == ".npz" else Weights(path).metadata
    except CheckpointError:
        return False
    return any(key.startswith("vitscale.") for key in metadata)


def _replace(new: Path, old: Path) -> None:
    """Rename, also over a folder that holds files: `new` then is the old folder, or gone."""
    if not old.is_dir() or not any(old.iterdir()):
        os.replace(new, old)
    elif not _exchange(new, old):  # no atomic way here: for an instant there is neither
        aside = new.with_name(f"{new.name}-old")
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once, where the system and the file system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
