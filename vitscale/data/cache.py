"""A bounded cache of remote chunks on a node's own disk, shared by all processes of the node.

A chunk is a file named by the hash of its key. The limit is divided evenly among folders, so
that adding a file looks through one folder only. There is no lock and no list: files appear by
rename, a hit renews the file's time, and the oldest are removed first. What a killed process
leaves behind is an old file like any other.
"""

import contextlib
import errno
import os
import secrets
from pathlib import Path

import xxhash

FOLDER_BYTES = 256 << 20  # about 70 chunks of photographs: quick to look through


class NodeCache:
    """Up to `max_bytes` of chunks in `folder`; a process may exceed it by the chunk it adds."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._root = Path(folder)
        self._num_folders = min(4096, max(1, max_bytes // FOLDER_BYTES))
        self._folder_bytes = max_bytes // self._num_folders

    def get(self, key: str) -> bytes | None:
        """What was put under the key, if it is still there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # now the youngest: the least recently used go first
        except OSError:
            return None
        return data

    def holds(self, key: str) -> bool:
        """Whether `get` would find something."""
        return self._path(key).exists()

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, and remove what was not used for longest.

        A full or broken disk is no error. On a full one, it takes the place of older data.
        """
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(path.parent, len(data))
            try:
                _write(path, data)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._make_room(path.parent, len(data), disk_is_full=True)
                _write(path, data)

    def _path(self, key: str) -> Path:
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return self._root / f"{int(name[:8], 16) % self._num_folders:04d}" / name

    def _make_room(self, folder: Path, num_bytes: int, *, disk_is_full: bool = False) -> None:
        """Remove the oldest files: what is above the limit, or `num_bytes` of a full disk."""
        files = []
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another process removed it
                info = entry.stat()
                files.append((info.st_mtime_ns, info.st_size, entry.path))
        held = sum(size for _, size, _ in files)
        excess = num_bytes if disk_is_full else held + num_bytes - self._folder_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            excess -= size


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and leave nothing behind if that fails."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
