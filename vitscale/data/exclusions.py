"""The list of training images that deduplication found, and that training leaves out."""

import itertools
import json

import numpy as np
from jaxtyping import Int64

from vitscale.data.index import Index
from vitscale.errors import DataError, StoreError
from vitscale.stores import storage

FORMAT, VERSION = "vitscale-exclude", 1


def load_exclusions(path: str, index: Index) -> Int64[np.ndarray, " n"]:
    """The sample ids of `index` that the list at `path` leaves out, in rising order.

    Raises DataError for a list that is missing, damaged, no such list, or made for other
    shards; StoreError for one that cannot be read.
    """
    remake = f"make it with: python tools/data.py dedup INDEX --against TEST --out {path}"
    content = _read(path, remake)
    try:
        values = json.loads(content)
        file_format = f"{values['format']} {values['version']}"
        fingerprint, ids = values["index_fingerprint"], values["ids"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is damaged, or not an exclusion list; {remake}") from None
    if file_format != f"{FORMAT} {VERSION}":
        raise DataError(f"{path} is of the format {file_format}, not {FORMAT} {VERSION}; {remake}")
    if fingerprint != index.fingerprint():
        raise DataError(
            f"exclusion list {path} was made for other shards (fingerprint {fingerprint}, this index has "
            f"{index.fingerprint()}); {remake}"
        )
    valid = range(index.num_samples)
    are_ids = isinstance(ids, list) and all(
        type(sample_id) is int and sample_id in valid for sample_id in ids
    )
    if not are_ids or any(first >= second for first, second in itertools.pairwise(ids)):
        raise DataError(
            f"{path} is damaged: its ids do not rise within the {index.num_samples:,} samples; {remake}"
        )
    return np.array(ids, dtype=np.int64)


def _read(path: str, remake: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"exclusion list {path} is missing; {remake}") from None
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"exclusion list {path} cannot be read: {reason}; {remake}") from None
