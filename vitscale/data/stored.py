"""Arrays in .npy files beside an index, each with its checksum.

Other content has another name, so writing an array never changes what an index refers to.
"""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import xxhash

from vitscale.errors import DataError, StoreError
from vitscale.stores import storage
from vitscale.system import atomic

_NAME_DIGITS = 8  # of the checksum, in the name of a file


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array that is in memory, or in a file that is not read before it is asked for.

    array: None = it is in the file `url`, whose bytes have this checksum. remake: where the
    file belongs and how to make it, as the end of a message.
    """

    array: np.ndarray | None = None
    url: str = ""
    checksum: str = ""
    remake: str = ""

    def read(self) -> np.ndarray:
        """The array; of a local file, mapped, so that processes share it.

        Raises DataError if the file is missing or damaged, StoreError if it cannot be read.
        """
        if self.array is not None:
            return self.array
        try:
            data = _open(self.url)
        except FileNotFoundError:
            raise DataError(f"{self.url} is missing {self.remake}") from None
        except ValueError:  # numpy maps no file of 0 bytes
            raise DataError(f"{self.url} is empty {self.remake}") from None
        except OSError as error:
            raise StoreError(f"{self.url} cannot be read: {error.strerror or error}") from None
        if _checksum(data) != self.checksum:
            raise DataError(f"{self.url} does not match its checksum {self.remake}")
        return _parse(data)


def write_array(index: Path, kind: str, array: np.ndarray) -> dict[str, str]:
    """Write an array beside an index, like index.chunks.3f2a90bc.npy: its name and checksum."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getvalue()
    checksum = _checksum(data)
    path = index.with_suffix(f".{kind}.{checksum[:_NAME_DIGITS]}.npy")
    atomic.write(path, data)
    return {"file": path.name, "checksum": checksum}


def remove_arrays(index: Path, keep: set[str]) -> None:
    """Remove the files of arrays beside an index but those of these names."""
    # indexes of earlier commits have their arrays in index.chunks.npy and index.keys.npy
    name = re.compile(rf"{re.escape(index.stem)}\.(chunks|keys)(\.[0-9a-f]{{{_NAME_DIGITS}}})?\.npy")
    for path in index.parent.iterdir():
        if name.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


def _open(url: str) -> np.ndarray:
    """The bytes of a file, uint8 [n]."""
    if storage.is_local(url):
        return np.memmap(storage.local_path(url), dtype=np.uint8, mode="r")
    return np.frombuffer(storage.read_bytes(url), dtype=np.uint8)


def _parse(data: np.ndarray) -> np.ndarray:
    """The array in the bytes of an .npy file, without a copy."""
    stream = io.BytesIO(data[:4096].tobytes())
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return data[stream.tell() :].view(dtype).reshape(shape)


def _checksum(data: bytes | np.ndarray) -> str:
    return xxhash.xxh3_128(data if isinstance(data, bytes) else data.data).hexdigest()
