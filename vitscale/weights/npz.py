"""NumPy's .npz archives (a zip of .npy files, the format of Google's models), array by array.

Nothing in them is ever unpickled. Equal tensors make equal files, byte for byte.
"""

import errno
import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.weights.files import Dtype, NamedTensors, rounded

_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What zipfile, decompressors and NumPy raise for what is no archive of arrays, or encrypted.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
)
_BF16 = np.dtype("V2")  # what NumPy, which has no bfloat16, makes of one


class NpzReader:
    """The named arrays of an .npz file (a TensorSource)."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError for what is not an .npz file."""
        self.path = str(path)
        self._rows: dict[str, Iterator[Tensor]] = {}
        try:
            self._zip = zipfile.ZipFile(path)
            self._dtypes: dict[str, np.dtype] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}
            for info in self._zip.infolist():
                name = info.filename.removesuffix(".npy")
                with self._zip.open(info) as member:
                    self.shapes[name], _, self._dtypes[name] = _read_header(member)
                # More values than bytes, or more bytes than deflate can pack (which the archive
                # only claims): reading would allocate memory for what is not there.
                claimed = max(_num_values_at_least(self.shapes[name]), info.file_size)
                if name == info.filename or claimed > min(info.file_size, 1032 * info.compress_size):
                    raise ValueError
        except (*_DAMAGED, MemoryError) as error:  # the last where a header nests too deeply
            _let_through(error)
            raise CheckpointError(f"{path} is not an .npz file of arrays, or is damaged") from None

    @property
    def metadata(self) -> dict[str, str]:
        """What write_npz put into the archive's comment; empty for other archives."""
        try:
            values = json.loads(self._zip.comment or b"{}")
        except (ValueError, RecursionError):
            return {}
        is_ours = isinstance(values, dict) and all(isinstance(text, str) for text in values.values())
        return values if is_ours else {}

    def tensor(self, name: str) -> Tensor:
        """One whole array, as fp32."""
        with self._member(name) as member:
            return _to_tensor(npy.read_array(member, allow_pickle=False))

    def row(self, name: str, index: int) -> Tensor:
        """Slice `index` along the first axis, as fp32.

        Ask for the slices of an array in order from 0, so that each is decompressed once.
        """
        if index == 0:
            self._rows[name] = self._read_rows(name)
        return next(self._rows[name])

    def _read_rows(self, name: str) -> Iterator[Tensor]:
        with self._member(name) as member:
            (count, *shape), is_fortran, dtype = _read_header(member)
            if is_fortran:  # the values of a row do not lie together
                yield from self.tensor(name)
                return
            for _ in range(count):
                yield _read_row(member, tuple(shape), dtype)

    @contextmanager
    def _member(self, name: str) -> Iterator[Any]:
        dtype = self._dtypes[name]
        if dtype.hasobject:
            raise CheckpointError(
                f"{self.path}: {name} holds Python objects, whose loading can run code; save plain numbers"
            )
        if dtype != _BF16 and (dtype.kind != "f" or dtype.itemsize > 8):
            raise CheckpointError(f"{self.path}: {name} is {dtype}; save it as float32, float16 or bfloat16")
        try:
            with self._zip.open(f"{name}.npy") as member:
                yield member
        except _DAMAGED as error:
            _let_through(error)
            raise CheckpointError(f"{self.path} is damaged: {name} cannot be read") from None


def _let_through(error: BaseException) -> None:
    """Raise what a disk refuses again. An OSError of a decompressor has no errno, and EINVAL is
    that of a place before the file's beginning.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


def write_npz(path: Path, tensors: NamedTensors, dtype: Dtype, metadata: Mapping[str, str]) -> None:
    """Write and fsync an uncompressed archive, tensor by tensor; `metadata` is its comment."""
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = json.dumps(dict(metadata)).encode()
            for name, tensor in tensors:
                # A plain ZipInfo carries no time of day: equal tensors make equal files.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    array = rounded(name, tensor, dtype).contiguous().numpy()
                    npy.write_array(member, array, allow_pickle=False)
                del tensor, array  # before the next one is read
        file.flush()
        os.fsync(file.fileno())


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, whether the values are in Fortran's order, and the dtype."""
    return _HEADER_READERS[npy.read_magic(member)](member)


def _num_values_at_least(shape: tuple[int, ...]) -> int:
    """The number of values, with empty axes counted as 1: 30,000,000 x 0 still means many rows.

    Raises ValueError for a negative size.
    """
    if min(shape, default=0) < 0:
        raise ValueError
    return math.prod(max(1, size) for size in shape)


def _read_row(member: Any, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(member.read(size))
    if len(data) != size:
        raise EOFError
    return _to_tensor(np.frombuffer(data, dtype).reshape(shape))


def _to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype == _BF16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
