"""Random numbers keyed by what they belong to, never by process, worker or time.

Every draw names its owner, (seed, domain, up to three integers), and gets its own block of a
Philox4x64 stream. So no state is saved, and no rank, worker count or world size alters a draw.
Only Philox's raw words are used, which NumPy keeps stable: upgrading it does not reorder a run.
"""

import numpy as np
from jaxtyping import Float64, Int64

# The numbers are part of every stream's key: they never change.
DOMAINS = {
    "chunks": 1,
    "window": 2,
    "replace": 3,
    "crop": 4,
    "flip": 5,
    "mixup": 6,
    "dropout": 7,
    "init": 8,
    "pack": 9,
    "demo": 10,
    "split": 11,
    "mix": 12,
    "randaugment": 13,
    "jitter": 14,
    "erase": 15,
    "cutmix": 16,
}


def raw(n: int, seed: int, domain: str, *ids: int) -> np.ndarray:
    """`n` uint64 words of the stream (seed, domain, ids)."""
    if len(ids) > 3:
        raise ValueError(f"a keyed stream takes at most 3 ids, not {len(ids)}")
    # The lowest counter word numbers the blocks of a stream; the ids fill the three above it.
    counter = np.array([0, *ids, *[0] * (3 - len(ids))], dtype=np.uint64)
    key = np.array([seed, DOMAINS[domain]], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(n)


def uniform(n: int, seed: int, domain: str, *ids: int) -> Float64[np.ndarray, " n"]:
    """`n` uniform numbers in [0, 1), of 53 bits each."""
    return (raw(n, seed, domain, *ids) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, domain: str, *ids: int) -> Int64[np.ndarray, " n"]:
    """A permutation of range(n), n < 2^40: the order of `n` random words.

    Each word's low bits are replaced by its position, so that the words are sorted in place,
    with no index beside them: three times as fast for millions.
    """
    bits = np.uint64(max(1, (n - 1).bit_length()))
    words = raw(n, seed, domain, *ids) >> bits << bits | np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def derive_seed(seed: int, domain: str, *ids: int) -> int:
    """One 63-bit seed for a generator that is not ours (torch's), keyed in the same way."""
    return int(raw(1, seed, domain, *ids)[0] >> np.uint64(1))
