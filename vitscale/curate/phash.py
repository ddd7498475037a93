"""Perceptual hashes of 128 bits, and the search for near ones.

A hash survives recompression, resizing and small crops. Each bit says whether one of the 128
lowest frequencies of the luminance's cosine transform is above their median (Zauner 2010,
"pHash", which takes 64). Measured on 240 ImageNet photographs and 72 million pairs of CIFAR-10
images, copies that were re-encoded, resized, made grey, darker, brighter or of other contrast
are always within 24 bits. For the rest:

    within                                         24 bits    20 bits
    photographs cropped by 3 % of their sides         99 %       95 %
    photographs cropped by 5 % of their sides         70 %       47 %
    pairs of CIFAR-10 images                            68         47
    of these pairs, copies to the eye                   65         46

64 bits with a threshold that finds 98 % of the 3 % crops match 180 pairs that are no copies.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import scipy.fft
from jaxtyping import Float32, Int32, Int64, UInt8, UInt64
from PIL import Image

BITS = 128
MAX_THRESHOLD = 32  # different images are 64 +- 6 bits apart
SIDE = 32
MIN_DETAIL = 2.0
_WORD_BITS = 64
_MAX_BAND_BITS = 20  # a band has 2^bits buckets
_BLOCK_QUERIES = 256
_MAX_CANDIDATES = 1 << 18  # compared at once, which bounds the memory
_CANDIDATE_COST = 0.5  # of comparing a stored hash, in units of looking up a bucket


def luminance(pixels: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "32 32"]:
    """The grey image that is hashed: squeezed to 32 x 32 pixels, antialiased."""
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)


def hash_luminance(
    grey: Float32[np.ndarray, "n 32 32"],
) -> tuple[UInt64[np.ndarray, "n 2"], UInt64[np.ndarray, "n 2"], Float32[np.ndarray, " n"]]:
    """Return the hashes of images, the hashes of their mirror images, and their detail.

    Detail is the median magnitude of the hashed coefficients in grey levels. Below MIN_DETAIL
    their signs are noise of rounding and compression, or equal for all images of a kind: blank
    ones, but also smooth skies and gradients, which variance would not reveal. Photographs have
    at least 12, CIFAR-10 images at least 4.6.
    """
    low = np.asarray(scipy.fft.dctn(grey, axes=(1, 2), norm="ortho"))[:, _ROWS, _COLUMNS]  # [n, 128]
    mirrored = np.where(_COLUMNS % 2, -low, low)  # mirroring negates the odd horizontal frequencies
    return _signs(low), _signs(mirrored), np.median(np.abs(low), axis=1)


def _signs(low: Float32[np.ndarray, "n 128"]) -> UInt64[np.ndarray, "n 2"]:
    bits = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(bits).view(np.uint64)


def _low_frequencies() -> tuple[Int64[np.ndarray, " bits"], Int64[np.ndarray, " bits"]]:
    """Rows and columns of the 128 lowest frequencies by row + column, without the mean.

    Neighbouring frequencies have correlated signs, so neighbours are spread over the words.
    """
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    lowest = np.lexsort((rows, np.maximum(rows, columns), rows + columns))[1 : BITS + 1]
    spread = lowest[np.arange(BITS) * 37 % BITS]  # 37 is odd, so this is a permutation of 128
    return rows[spread], columns[spread]


_ROWS, _COLUMNS = _low_frequencies()


@dataclasses.dataclass(frozen=True)
class Band:
    """The bits [start, start + bits) of a hash, of which up to `radius` may differ."""

    start: int
    bits: int
    radius: int


def choose_bands(threshold: int, num_hashes: int) -> tuple[Band, ...]:
    """The cheapest bands of which hashes within `threshold` bits match in at least one.

    This is multi-index hashing (Norouzi et al. 2012, arXiv 1307.2982). Two hashes that exceed
    the radius of every band differ in at least sum(radius + 1) bits, so this sum must exceed
    the threshold. For threshold 24 and four bands:

        radii 6, 5, 5, 5:  7 + 6 + 6 + 6 = 25 > 24
    """
    candidates = [_split(threshold, num_bands) for num_bands in range(1, threshold + 2)]
    return min(candidates, key=lambda bands: _query_cost(bands, num_hashes))


def _split(threshold: int, num_bands: int) -> tuple[Band, ...]:
    edges = [BITS * band // num_bands for band in range(num_bands + 1)]
    # As equal as possible: the first `num_larger` radii are one larger than the others.
    share, num_larger = divmod(threshold + 1, num_bands)
    bands = []
    for band, (start, end) in enumerate(itertools.pairwise(edges)):
        radius = share if band < num_larger else share - 1
        bands.append(Band(start, min(end - start, _MAX_BAND_BITS), radius))
    return tuple(bands)


def _query_cost(bands: tuple[Band, ...], num_hashes: int) -> float:
    """What one query costs, in units of looking up a bucket."""
    return sum(
        sum(math.comb(band.bits, flipped) for flipped in range(band.radius + 1))
        * (1 + _CANDIDATE_COST * num_hashes / 2**band.bits)
        for band in bands
    )


class HashTable:
    """Finds the nearest of n stored hashes, of those that are within their thresholds.

    thresholds: how many bits may differ from each hash.
    It takes 17 bytes for each hash, and 4 more for each band.
    """

    def __init__(self, hashes: UInt64[np.ndarray, "n 2"], thresholds: UInt8[np.ndarray, " n"]) -> None:
        self.thresholds = thresholds
        self.largest = int(thresholds.max(initial=0))
        self.words = np.ascontiguousarray(hashes.T)  # [2, n]
        self.buckets = [_Buckets(hashes, band) for band in choose_bands(self.largest, len(hashes))]

    def nearest(
        self, queries: UInt64[np.ndarray, "q 2"]
    ) -> tuple[Int64[np.ndarray, " q"], Int64[np.ndarray, " q"]]:
        """The position of the nearest stored hash for each query, and its distance in bits.

        Of equally near hashes the first counts. Both are -1 where none is within its threshold.
        """
        none = np.iinfo(np.int64).max
        # Distance in the high 32 bits, position in the low: the least is the nearest and first.
        best = np.full(len(queries), none)  # [q]
        for start in range(0, len(queries), _BLOCK_QUERIES):
            block = queries[start : start + _BLOCK_QUERIES]
            for buckets in self.buckets:
                for candidates in buckets.candidates(block):
                    query, position, distance = self._within_threshold(block, *candidates)
                    np.minimum.at(best, start + query, distance << 32 | position)
        has_match = best < none
        return np.where(has_match, best & 0xFFFFFFFF, -1), np.where(has_match, best >> 32, -1)

    def _within_threshold(
        self,
        queries: UInt64[np.ndarray, "q 2"],
        query: Int64[np.ndarray, " c"],
        position: Int32[np.ndarray, " c"],
    ) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
        """The candidates within their thresholds, with distances. One word rules out most."""
        first_word = np.bitwise_count(queries[query, 0] ^ self.words[0, position])
        kept = np.flatnonzero(first_word <= self.largest)
        query, position = query[kept], position[kept].astype(np.int64)
        distance = first_word[kept] + np.bitwise_count(queries[query, 1] ^ self.words[1, position])
        kept = np.flatnonzero(distance <= self.thresholds[position])
        return query[kept], position[kept], distance[kept].astype(np.int64)


class _Buckets:
    """The positions of the stored hashes, sorted by the bits of one band.

    Those whose band has the value `key` are order[starts[key] : starts[key + 1]].
    """

    def __init__(self, hashes: UInt64[np.ndarray, "n 2"], band: Band) -> None:
        self.band = band
        keys = _band_keys(hashes, band)
        self.order = np.argsort(keys, kind="stable").astype(np.int32)  # [n]
        counts = np.bincount(keys, minlength=1 << band.bits)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # [2^bits + 1]
        self.flips = _flips(band)

    def candidates(
        self, queries: UInt64[np.ndarray, "q 2"]
    ) -> Iterator[tuple[Int64[np.ndarray, " c"], Int32[np.ndarray, " c"]]]:
        """Pairs (query, stored hash) whose bands are within the radius, in bounded pieces."""
        keys = (_band_keys(queries, self.band)[:, None] ^ self.flips).ravel()  # [q * flips]
        first = self.starts[keys]
        counts = self.starts[keys + 1] - first
        occupied = np.flatnonzero(counts)  # the buckets that hold a hash: [b]
        query, first, counts = occupied // len(self.flips), first[occupied], counts[occupied]
        ends = np.cumsum(counts, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.unique([*np.searchsorted(ends, np.arange(0, total, _MAX_CANDIDATES)), len(ends)])
        for low, high in itertools.pairwise(cuts):
            # The ranges [first, first + count) in a row, without a loop. For [5, 7), [20, 23):
            # arange(5) + repeat([5 - 0, 20 - 2], [2, 3]) = 5 6 20 21 22.
            piece = counts[low:high]
            before = np.cumsum(piece) - piece
            place = np.arange(piece.sum()) + np.repeat(first[low:high] - before, piece)
            yield np.repeat(query[low:high], piece), self.order[place]


def _band_keys(hashes: UInt64[np.ndarray, "n 2"], band: Band) -> Int64[np.ndarray, " n"]:
    """The bits of a band as a number: bit `start` of a hash is its lowest."""
    word, shift = divmod(band.start, _WORD_BITS)
    keys = hashes[:, word] >> np.uint64(shift)
    if shift + band.bits > _WORD_BITS:
        keys = keys | hashes[:, word + 1] << np.uint64(_WORD_BITS - shift)
    return (keys & np.uint64((1 << band.bits) - 1)).astype(np.int64)


def _flips(band: Band) -> Int64[np.ndarray, " flips"]:
    """All masks with up to `radius` of the band's bits set."""
    bits = [1 << place for place in range(band.bits)]
    counts = range(band.radius + 1)
    return np.array([sum(chosen) for count in counts for chosen in itertools.combinations(bits, count)])
