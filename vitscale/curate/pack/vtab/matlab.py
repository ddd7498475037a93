"""Reads variables of MATLAB v5 files."""

import io

import numpy as np

from vitscale.errors import DataError


def read_mat(content: bytes, where: str, variable: str) -> np.ndarray:
    """A variable of integers. Raises DataError for a damaged file, or one without it."""
    from scipy.io import loadmat
    from scipy.io.matlab import matfile_version

    file = io.BytesIO(content)
    try:
        if matfile_version(file)[0] > 1:
            raise ValueError("it is of version 7.3, which is HDF5")
        value = loadmat(file, variable_names=[variable]).get(variable)
    except Exception as error:  # zlib.error, UnboundLocalError and others, by the damaged byte
        raise DataError(
            f"{where} is no whole MATLAB file of version 5 ({error}); download it again"
        ) from None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "ui":
        raise DataError(f"{where} has no array of integers {variable!r}; download it again")
    return value
