"""Puts an export in its place: complete or not at all, and over nothing but an earlier export.

A kill at any instant leaves the old export or the new one, and at worst a temporary name, which
begins with a dot.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitscale.errors import CheckpointError
from vitscale.system import atomic
from vitscale.weights.files import EXPORT_NAME, INDEX_NAME, ONNX_NAME, Weights
from vitscale.weights.npz import NpzReader

_FOLDER_FILES = (
    EXPORT_NAME,
    INDEX_NAME,
    "config.json",
    "preprocessor_config.json",
    ONNX_NAME,
    f"{ONNX_NAME}.data",
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A temporary path beside `out`, to write a file or a folder to.

    When the block ends, it is synced to disk and renamed to `out`.
    Raises CheckpointError before the block if `out` exists and is not an export of vitscale.
    """
    out = out.resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.appearing(out, _replace) as temporary:
        yield temporary


def _check_replaceable(out: Path) -> None:
    """Raise CheckpointError unless `out` is free, an empty folder, or an earlier export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir():
        shards = {path.name for path in out.glob("model-*-of-*.safetensors")}
        strangers = sorted({path.name for path in out.iterdir()} - shards - set(_FOLDER_FILES))
        exports = [out / name for name in (EXPORT_NAME, INDEX_NAME, ONNX_NAME) if (out / name).is_file()]
        if strangers:
            raise CheckpointError(f"{out} is not replaced: it also holds {strangers[0]}; name a new folder")
        if not exports or not _is_ours(exports[0]):
            raise CheckpointError(
                f"{out} is not replaced: its weights are not an export of vitscale; name a new folder"
            )
    elif not _is_ours(out):
        raise CheckpointError(f"{out} is not replaced: it is not an export of vitscale; name a new file")


def _is_ours(path: Path) -> bool:
    if path.suffix == ".onnx":
        return b"vitscale.model" in path.read_bytes()  # its metadata, in Protocol Buffers
    try:
        metadata = NpzReader(path).metadata if path.suffix == ".npz" else Weights(path).metadata
    except CheckpointError:
        return False
    return any(key.startswith("vitscale.") for key in metadata)


def _replace(new: Path, old: Path) -> None:
    """Rename `new` to `old`. If `old` was a folder with files, `new` is then that, or gone."""
    if not old.is_dir() or not any(old.iterdir()):
        os.replace(new, old)
    elif not _exchange(new, old):  # not atomic, for lack of a way: for an instant there is neither
        aside = new.with_name(f"{new.name}-old")
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
