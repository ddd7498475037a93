"""Random numbers keyed by what they belong to, never by process, worker or time.

Every draw names its owner, (seed, domain, up to three integers), and gets its own block of a
Philox4x64 stream. So no state is saved, and no rank, worker count or world size alters a draw.
Only Philox's raw words are used, which NumPy keeps stable: upgrading it does not reorder a run.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, UInt64

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
    "strata": 17,
    "drop_path": 18,
    "dev": 19,
    "linear": 20,
    "corrupt": 21,
    "fraction": 22,
}


# Philox4x64: multipliers, and what is added to the key's two words after each of the rounds.
_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_LOW_HALVES, _HIGH_HALVES = _MULTIPLIERS & np.uint64(0xFFFFFFFF), _MULTIPLIERS >> np.uint64(32)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_FEW_ROWS = 12  # up to here, one generator a row is faster than arithmetic on arrays


def raw(n: int, seed: int, domain: str, *ids: int, block: int = 0) -> np.ndarray:
    """`n` uint64 words of the stream (seed, domain, ids), from a block of four words on."""
    if len(ids) > 3:
        raise ValueError(f"a keyed stream takes at most 3 ids, not {len(ids)}")
    # The lowest counter word numbers the blocks of a stream; the ids fill the three above it.
    counter = np.array([block, *ids, *[0] * (3 - len(ids))], dtype=np.uint64)
    key = np.array([seed, DOMAINS[domain]], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(n)


def uniform(n: int, seed: int, domain: str, *ids: int) -> Float64[np.ndarray, " n"]:
    """`n` uniform numbers in [0, 1), of 53 bits each."""
    return (raw(n, seed, domain, *ids) >> np.uint64(11)) * 2.0**-53


def uniform_part(start: int, n: int, seed: int, domain: str, *ids: int) -> Float64[np.ndarray, " n"]:
    """Numbers start to start + n of `uniform`, without those before: a stream may be long."""
    block, skipped = divmod(start, 4)  # a block has four words
    return (raw(skipped + n, seed, domain, *ids, block=block)[skipped:] >> np.uint64(11)) * 2.0**-53


def uniform_rows(
    n: int, seed: int, domains: Sequence[str], ids: Int64[np.ndarray, "m 3"]
) -> Float64[np.ndarray, "d m n"]:
    """uniform(n, seed, domain, *row) of each of d domains and each row of `ids`, n up to 4.

    It takes a fifth of the time for a hundred rows.
    """
    assert n <= 4, "one block of a stream has four words"
    if len(domains) * len(ids) <= _FEW_ROWS:
        rows = [[uniform(n, seed, domain, *row) for row in ids.tolist()] for domain in domains]
        return np.array(rows).reshape(len(domains), len(ids), n)
    numbers = np.array([DOMAINS[domain] for domain in domains], dtype=np.uint64)
    words = _first_blocks(seed, np.repeat(numbers, len(ids)), np.tile(ids, (len(domains), 1)))
    return ((words[:n] >> np.uint64(11)) * 2.0**-53).T.reshape(len(domains), len(ids), n)


def _first_blocks(
    seed: int, domains: UInt64[np.ndarray, " r"], ids: Int64[np.ndarray, "r 3"]
) -> UInt64[np.ndarray, "4 r"]:
    """The first four words of r streams: Philox4x64, as NumPy computes it, on arrays.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3". A round takes the
    counter's words c0 c1 c2 c3 and the key's k0 k1 to

        high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0)
    """
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    words = ids.T.astype(np.uint64)  # [3, r]
    even = np.stack([np.ones_like(domains), words[1]])  # c0 c2 [2, r]; NumPy's first c0 is 1
    odd = words[::2]  # c1 c3 [2, r]
    key = np.stack([np.full_like(domains, seed), domains])  # k0 k1 [2, r]
    steps = np.array(_KEY_STEPS, dtype=np.uint64)[:, None]
    for _ in range(_ROUNDS):
        # The upper half of a product of 64 bits, from four products of 32 bits.
        left, right = even >> half, even & low
        middle = left * _LOW_HALVES + (right * _LOW_HALVES >> half)
        other = right * _HIGH_HALVES + (middle & low)
        high = left * _HIGH_HALVES + (middle >> half) + (other >> half)
        even, odd = high[::-1] ^ odd ^ key, (even * _MULTIPLIERS)[::-1]
        key = key + steps
    return np.stack([even[0], odd[0], even[1], odd[1]])


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
