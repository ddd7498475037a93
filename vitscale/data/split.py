"""Parts of an index that hashes of its samples' keys choose: the validation split, a fraction.

A sample validates if the 16-bit hash of its key is below the fraction of 65,536. So the split
is the same on every machine and in any order of the shards, and a larger fraction contains a
smaller one. The index holds the hashes, and the lowest and the highest of each class: whether
a class has samples on both sides is known without reading them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt16

from vitscale import rng
from vitscale.data.index import Index
from vitscale.errors import ConfigError, DataError

NUM_HASHES = 1 << 16


class SplitClasses(NamedTuple):
    """Labels by what a split leaves them, rising: only training, or only validation samples."""

    only_training: list[int]
    only_validation: list[int]


def validation_ids(index: Index, fraction: float, path: str) -> Int64[np.ndarray, " n"]:
    """The ids, rising, of the samples that validate. path: of the index, for messages.

    Raises DataError for an index that does not hold the hashes, and ConfigError for a fraction
    that leaves no sample on one side.
    """
    hashes = _key_hashes(index, path, "data.validation_fraction")
    ids = np.flatnonzero(hashes < _threshold(fraction)).astype(np.int64)
    if not 0 < len(ids) < index.num_samples:
        raise ConfigError(
            f"data.validation_fraction {fraction} leaves {len(ids):,} of {index.num_samples:,} samples for "
            "validation; choose one nearer to 0.5, or 0 to train on all samples"
        )
    return ids


def in_fraction(index: Index, fraction: float, seed: int, path: str) -> Bool[np.ndarray, " n"]:
    """Whether each sample is in the part of an index that `seed` chooses. path: for messages.

    Raises DataError for an index that does not hold the hashes.
    """
    hashes = _key_hashes(index, path, "data.fraction")
    return (rng.permutation(NUM_HASHES, seed, "fraction") < _threshold(fraction))[hashes]


def share(fraction: float) -> float:
    """The share of the samples that a fraction takes, on average: a multiple of 1/65,536."""
    return _threshold(fraction) / NUM_HASHES


def split_classes(index: Index, fraction: float) -> SplitClasses:
    """The labels that a split leaves without validation or without training samples."""
    threshold = _threshold(fraction)
    ranges = sorted(index.hash_ranges.items())
    return SplitClasses(
        only_training=[label for label, (lowest, _) in ranges if lowest >= threshold],
        only_validation=[label for label, (_, highest) in ranges if highest < threshold],
    )


def _key_hashes(index: Index, path: str, key: str) -> UInt16[np.ndarray, " n"]:
    if index.key_hashes is None:
        raise DataError(
            f"{path} holds no hashes of the samples' keys, which {key} needs: an earlier vitscale made it; "
            f"index again: python tools/data.py index SHARDS --out {path}"
        )
    return index.key_hashes.read()


def _threshold(fraction: float) -> int:
    return round(fraction * NUM_HASHES)
