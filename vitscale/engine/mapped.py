"""Tensors in files of a fast local disk: the kernel keeps in memory what of them fits."""

import os
import tempfile

import torch
from torch import Tensor

from vitscale.errors import StoreError
from vitscale.quantities import size_text


def mapped_zeros(count: int, folder: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros [count] in a file of `folder`, which ends with this process.

    The file has no name by the time of return, so that a kill leaves nothing behind. Raises
    StoreError if it cannot be made, or the disk has no space for it: later that would be a
    SIGBUS.
    """
    num_bytes = dtype.itemsize * count
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vitscale-") as file:
            if num_bytes:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise StoreError(
            f"engine.offload_folder {folder}: {size_text(num_bytes)} of the optimizer's moments cannot be "
            f"written ({error.strerror or error}); choose a folder on a local disk with space for 8 bytes "
            "for each parameter that the node's ranks own"
        ) from None
