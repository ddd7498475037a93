"""A set of sample ids that stays small for hundreds of millions of them, and counts fast."""

import numpy as np
import xxhash
from jaxtyping import Bool, Int64, UInt64

_BITS = 64


class IdSet:
    """Ids among 0 to n - 1, as a bit for each: 76 MB for 303 million, with the counts.

    The counts are of the ids before each word of 64 that are not in the set: from them follow
    how many members are below any id, and any id that is no member by its rank among those.
    """

    def __init__(self, words: UInt64[np.ndarray, " w"]) -> None:
        self._words = words  # the lowest bit of the first is id 0
        absent = _BITS - np.bitwise_count(words).astype(np.int64)
        self._absent_before = np.concatenate([[0], np.cumsum(absent)])  # [w + 1]

    @classmethod
    def where(cls, is_member: Bool[np.ndarray, " n"]) -> "IdSet":
        """The ids at which a mask is true."""
        bits = np.packbits(is_member, bitorder="little")
        padded = np.zeros(-(-len(is_member) // _BITS) * _BITS // 8, dtype=np.uint8)
        padded[: len(bits)] = bits
        return cls(padded.view("<u8"))

    @classmethod
    def of(cls, ids: Int64[np.ndarray, " m"], num_ids: int) -> "IdSet":
        """The set of `ids` among 0 to num_ids - 1."""
        is_member = np.zeros(num_ids, dtype=np.bool_)
        is_member[ids] = True
        return cls.where(is_member)

    def __len__(self) -> int:
        return len(self._words) * _BITS - int(self._absent_before[-1])

    def __contains__(self, sample_id: int) -> bool:
        word, bit = divmod(sample_id, _BITS)
        return word < len(self._words) and bool(int(self._words[word]) >> bit & 1)

    def count_below(self, ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """How many members are below each of `ids`, up to the number of all ids."""
        words, bits = np.divmod(ids, _BITS)
        # An id at the end may lie after the last word: no bit of a word counts for it.
        last = self._words[np.minimum(words, len(self._words) - 1)] if len(self._words) else np.uint64(0)
        below = last & ((np.uint64(1) << bits.astype(np.uint64)) - np.uint64(1))
        return words * _BITS - self._absent_before[words] + np.bitwise_count(below)

    def absent(self, ranks: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The ids that are no members by their ranks among those, which count from 0."""
        words = np.searchsorted(self._absent_before, ranks, side="right") - 1  # [n]
        places = np.arange(_BITS, dtype=np.uint64)
        is_absent = (~self._words[words, None] >> places & np.uint64(1)).astype(np.uint8)  # [n, 64]
        found = np.cumsum(is_absent, axis=1) == (ranks - self._absent_before[words] + 1)[:, None]
        return words * _BITS + np.argmax(found, axis=1)  # the first place that completes the count

    def union(self, other: "IdSet") -> "IdSet":
        """The members of either of two sets among as many ids."""
        return IdSet(self._words | other._words)

    def digest(self) -> str:
        """Names the set: equal for equal sets among as many ids."""
        return xxhash.xxh3_128(self._words.data).hexdigest()


# The empty set among any number of ids, in no memory.
NO_IDS = IdSet(np.empty(0, dtype=np.uint64))
