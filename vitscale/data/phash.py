"""Perceptual hashes: 128 bits that survive recompression, resizing and small crops, and the search for
near
ones.

A bit is the sign of a low frequency of the luminance's cosine transform against the median (Zauner 2010,
"pHash", which takes 64). Measured on 240 ImageNet photographs and 12,000 CIFAR-10 images: within 24 bits
lie
all copies that were re-encoded, resized, made grey, darker, brighter or of other contrast, 99 % of the
photographs cropped by 3 % of their sides and 70 % of those cropped by 5 %; and of 72 million pairs of
CIFAR-10 images 68, of which 65 are copies to the eye. Within 20 bits: 95 %, 47 %, and 46 of 47. 64 bits
that
find 98 % of the 3 % crops take in 180 pairs that are none.
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
_WORD = 64
_MAX_BAND_BITS = 20
_QUERIES = 256
_CANDIDATES = 1 << 18
_CANDIDATE_COST = 0.5  # of comparing a stored hash, in units of looking up a bucket


def luminance(pixels: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "32 32"]:
    """The grey image of 32 x 32 pixels (squeezed to the square, antialiased) that is hashed."""
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)


def hash_luminance(
    grey: Float32[np.ndarray, "n 32 32"],
) -> tuple[UInt64[np.ndarray, "n 2"], UInt64[np.ndarray, "n 2"], Float32[np.ndarray, " n"]]:
    """The hashes of images, those of their mirror images, and their detail.

    Detail is the median size of the hashed coefficients in grey levels. Below MIN_DETAIL their signs are
    noise of rounding and compression, or equal for all images of a kind: blank ones, but also smooth skies
    and gradients, which variance would not tell. Photographs have 12 and more, CIFAR-10 images 4.6 and
    more.
    """
    low = np.asarray(scipy.fft.dctn(grey, axes=(1, 2), norm="ortho"))[:, _ROWS, _COLUMNS]  # [n, 128]
    mirrored = np.where(_COLUMNS % 2, -low, low)  # mirroring negates the odd horizontal frequencies
    return _signs(low), _signs(mirrored), np.median(np.abs(low), axis=1)


def _signs(low: Float32[np.ndarray, "n 128"]) -> UInt64[np.ndarray, "n 2"]:
    bits = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(bits).view(np.uint64)


def _low_frequencies() -> tuple[Int64[np.ndarray, " bits"], Int64[np.ndarray, " bits"]]:
    """Rows and columns of the 128 lowest frequencies by row + column, without the mean; in an order that
    spreads neighbours, whose signs go together, over the words.
    """
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    lowest = np.lexsort((rows, np.maximum(rows, columns), rows + columns))[1 : BITS + 1]
    spread = lowest[np.arange(BITS) * 37 % BITS]
    return rows[spread], columns[spread]


_ROWS, _COLUMNS = _low_frequencies()


@dataclasses.dataclass(frozen=True)
class Band:
    """Bits `start` to `start + bits` of a hash, which may differ in up to `radius` places."""

    start: int
    bits: int
    radius: int


def plan_bands(threshold: int, num_hashes: int) -> tuple[Band, ...]:
    """The cheapest bands such that hashes within `threshold` bits agree in at least one of them.

    With sum(radius + 1) > threshold over the bands, hashes that differ more in every band differ in more
    than `threshold` bits altogether (multi-index hashing, Norouzi et al. 2012, arXiv 1307.2982).
    """
    plans = [_split(threshold, count) for count in range(1, threshold + 2)]
    return min(plans, key=lambda bands: _cost(bands, num_hashes))


def _split(threshold: int, count: int) -> tuple[Band, ...]:
    edges = [BITS * number // count for number in range(count + 1)]
    smaller, larger = divmod(threshold + 1, count)
    return tuple(
        Band(start, min(end - start, _MAX_BAND_BITS), smaller - 1 + (number < larger))
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    )


def _cost(bands: tuple[Band, ...], num_hashes: int) -> float:
    """Of one query, in looked up buckets."""
    return sum(
        sum(math.comb(band.bits, flipped) for flipped in range(band.radius + 1))
        * (1 + _CANDIDATE_COST * num_hashes / 2**band.bits)
        for band in bands
    )


class HashTable:
    """Finds the nearest of n stored hashes within `threshold` bits; takes 16 bytes a hash and 4 a band."""

    def __init__(self, hashes: UInt64[np.ndarray, "n 2"], threshold: int) -> None:
        self.threshold = threshold
        self.words = np.ascontiguousarray(hashes.T)  # [2, n]
        self.buckets = [_Buckets(hashes, band) for band in plan_bands(threshold, len(hashes))]

    def nearest(
        self, queries: UInt64[np.ndarray, "q 2"]
    ) -> tuple[Int64[np.ndarray, " q"], Int64[np.ndarray, " q"]]:
        """Number of the nearest stored hash and its distance for each query, the first of equally near
        ones.

        Both are -1 where none is within the threshold.
        """
        none = np.iinfo(np.int64).max
        best = np.full(len(queries), none)  # distance and number in one, so that the least is the nearest
        for start in range(0, len(queries), _QUERIES):
            block = queries[start : start + _QUERIES]
            for buckets in self.buckets:
                for query, number in buckets.candidates(block):
                    query, number, distance = self._near(block, query, number)
                    np.minimum.at(best, start + query, distance << 32 | number)
        found = best < none
        return np.where(found, best & 0xFFFFFFFF, -1), np.where(found, best >> 32, -1)

    def _near(
        self,
        queries: UInt64[np.ndarray, "q 2"],
        query: Int64[np.ndarray, " c"],
        number: Int32[np.ndarray, " c"],
    ) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
        """Those candidates within the threshold, and their distances. One word rules most of them out."""
        first = np.bitwise_count(queries[query, 0] ^ self.words[0, number])
        kept = np.flatnonzero(first <= self.threshold)
        query, number = query[kept], number[kept].astype(np.int64)
        distance = first[kept] + np.bitwise_count(queries[query, 1] ^ self.words[1, number])
        kept = np.flatnonzero(distance <= self.threshold)
        return query[kept], number[kept], distance[kept].astype(np.int64)


class _Buckets:
    """The numbers of the stored hashes, sorted by the bits of one band."""

    def __init__(self, hashes: UInt64[np.ndarray, "n 2"], band: Band) -> None:
        self.band = band
        keys = _band_keys(hashes, band)
        self.order = np.argsort(keys, kind="stable").astype(np.int32)
        counts = np.bincount(keys, minlength=1 << band.bits)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.flips = _flips(band)

    def candidates(
        self, queries: UInt64[np.ndarray, "q 2"]
    ) -> Iterator[tuple[Int64[np.ndarray, " c"], Int32[np.ndarray, " c"]]]:
        """Pairs (query, stored hash) whose bands are within the radius, in pieces of bounded size."""
        keys = (_band_keys(queries, self.band)[:, None] ^ self.flips).ravel()  # [q * flips]
        first = self.starts[keys]
        counts = self.starts[keys + 1] - first
        occupied = np.flatnonzero(counts)
        query, first, counts = occupied // len(self.flips), first[occupied], counts[occupied]
        ends = np.cumsum(counts, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.unique([*np.searchsorted(ends, np.arange(0, total, _CANDIDATES)), len(ends)])
        for low, high in itertools.pairwise(cuts):
            piece = counts[low:high]
            before = np.cumsum(piece) - piece
            position = np.arange(piece.sum()) + np.repeat(first[low:high] - before, piece)
            yield np.repeat(query[low:high], piece), self.order[position]


def _band_keys(hashes: UInt64[np.ndarray, "n 2"], band: Band) -> Int64[np.ndarray, " n"]:
    word, shift = divmod(band.start, _WORD)
    keys = hashes[:, word] >> np.uint64(shift)
    if shift + band.bits > _WORD:
        keys = keys | hashes[:, word + 1] << np.uint64(_WORD - shift)
    return (keys & np.uint64((1 << band.bits) - 1)).astype(np.int64)


def _flips(band: Band) -> Int64[np.ndarray, " flips"]:
    """All masks of up to `radius` bits."""
    places = [1 << place for place in range(band.bits)]
    sizes = range(band.radius + 1)
    return np.array([sum(chosen) for size in sizes for chosen in itertools.combinations(places, size)])
