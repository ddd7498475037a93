"""Reads rows of HDF5 files; needs h5py, of the extra vtab."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vitscale.errors import ConfigError, DataError

_BLOCK_ROWS = 4096  # rows that are read at once


class Hdf5File:
    """An HDF5 file with arrays of n rows. All methods raise DataError for a damaged file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, name: str, row_shape: tuple[int, ...]) -> int:
        """The number of rows of an array. Raises DataError if they are not of that shape."""
        with self._open(name) as array:
            if array.ndim == 0 or array.shape[1:] != row_shape or array.dtype.kind not in "ui":
                raise DataError(
                    f"{self.path} has {name} of {array.shape} {array.dtype}, not (n, "
                    f"{', '.join(map(str, row_shape))}) of whole numbers; download it again"
                )
            return len(array)

    def read(self, name: str) -> np.ndarray:
        """A whole array: labels, which are small."""
        with self._open(name) as array:
            return array[:]

    def rows(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """Some rows of uint8, in one pass over those blocks of the file that have any."""
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted)
        with self._open(name) as array:
            chosen = np.empty((len(rows), *array.shape[1:]), np.uint8)
            ascending = wanted[order]
            for first in range(0, len(array), _BLOCK_ROWS):
                begin, end = np.searchsorted(ascending, [first, first + _BLOCK_ROWS])
                if begin < end:
                    block = array[first : first + _BLOCK_ROWS]
                    chosen[order[begin:end]] = block[ascending[begin:end] - first]
            return chosen

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            import h5py
        except ModuleNotFoundError:
            raise ConfigError("reading HDF5 files needs h5py; install it: bash tools/setup.sh vtab") from None
        try:
            with h5py.File(self.path, "r") as file:
                array = file.get(name)
                if not isinstance(array, h5py.Dataset):
                    raise DataError(f"{self.path} has no array {name}; download it again")
                yield array
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"{self.path} is no whole HDF5 file ({error}); download it again") from None
