"""Reads the matrices of smallNORB: binary files named .mat that are not MATLAB's.

A file has, in little-endian integers of 4 bytes: a magic number for its type, the number of
dimensions, the size of each (of at least three: surplus ones are 1); then the values.
"""

import gzip
import math
import zlib

import numpy as np

from vitscale.curate.pack.vtab.archives import MAX_HELD_BYTES
from vitscale.errors import DataError

_TYPES = {507333717: np.dtype(np.uint8), 507333716: np.dtype("<i4")}


def read_matrix(path: str, dtype: np.dtype, row_shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of a .mat or .mat.gz. Raises DataError if it is of another type or shape."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            data = file.read(MAX_HELD_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is cut or damaged ({error}); download it again") from None
    if len(data) > MAX_HELD_BYTES:
        raise DataError(f"{path} holds more than {MAX_HELD_BYTES:,} bytes; download it again")
    head = np.frombuffer(data[: len(data) // 4 * 4][:32], "<i4").tolist()
    if len(head) < 5 or head[0] not in _TYPES or not 1 <= head[1] <= 6 or len(head) < 2 + max(3, head[1]):
        raise DataError(f"{path} does not begin as a smallNORB matrix does; download it again")
    found, num_dimensions = _TYPES[head[0]], head[1]
    shape = tuple(head[2 : 2 + num_dimensions])
    if found != dtype or shape[1:] != row_shape or shape[0] < 0:
        expected = f"(n, {', '.join(map(str, row_shape))}) {dtype}"
        raise DataError(f"{path} has a matrix of {shape} {found}, not {expected}; download it again")
    start = 4 * (2 + max(3, num_dimensions))
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise DataError(
            f"{path} has {len(data) - start:,} bytes of values, but a matrix of {shape} has "
            f"{math.prod(shape) * dtype.itemsize:,}; download it again"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
