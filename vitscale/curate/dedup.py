"""Finds training images that are copies of test images, so that training can exclude them.

The ViT paper removes from its pretraining data what is near its downstream test sets (section
4.1). The test sets are hashed and held in memory, about 300 bytes an image. The training set
streams past them through worker processes, which return only the matches. An image is

- an exact copy if its decoded pixels are equal: the same picture in another container counts,
  and so does a file rewritten without its EXIF data;
- a near copy if its perceptual hash is near that of the test image or of its mirror image:
  training flips images, so a mirrored copy leaks as much. How near depends on the test set: its
  own images are no copies of one another, so the distance between them shows how much different
  images of its kind look alike.

A killed run starts over. The result is the same for any number of workers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import xxhash
from jaxtyping import Bool, UInt8, UInt64

from vitscale.curate.duplicates import ComparedSet, Duplicates, Pair, shard_of
from vitscale.curate.phash import BITS, MAX_THRESHOLD, MIN_DETAIL, SIDE, HashTable, hash_luminance, luminance
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index
from vitscale.data.indexing import open_index
from vitscale.data.reader import describe, read_any
from vitscale.data.samples import BadSample
from vitscale.errors import ConfigError
from vitscale.redaction import redact
from vitscale.system.processes import ProgressCallback, map_in_order, no_progress

THRESHOLD = 24
LEAST_THRESHOLD = 8  # within it are 98% of copies re-encoded at quality 70 or halved, of any kind
ALIKE_SHARE = 0.005  # of a test set's images: so many may be that near to another of them
NUM_LISTED_DAMAGE = 20
_RANGE = 512  # images of one task: half a second of work; a chunk across its end is read twice

T = TypeVar("T")


def find_duplicates(
    index: Index,
    against: Sequence[str],
    *,
    threshold: int | None = None,
    workers: int = 0,
    progress: ProgressCallback = no_progress,
) -> Duplicates:
    """Compare every training image with test sets.

    against: index.json files, or shards by glob, brace pattern or URL.
    threshold: in how many of 128 bits the hashes of copies may differ, 0 to 32. None = 24, but
        fewer, down to 8, for a test set whose own images are nearer to one another than that.
    workers: number of processes; 0 works in this one.
    progress: called with numbers of images, including those of the test sets.

    Raises ConfigError or DataError for missing data; damaged samples are counted and skipped.
    """
    _check_options(against, threshold, workers)
    test_indexes = [open_index(pattern) for pattern in against]
    num_done, num_images = 0, sum(images.num_samples for images in (index, *test_indexes))
    progress(num_done, num_images)

    def map_ranges(function: Callable[[Index, range], T], images: Index) -> list[T]:
        nonlocal num_done
        starts = range(0, images.num_samples, _RANGE)
        ranges = [range(start, min(start + _RANGE, images.num_samples)) for start in starts]
        results = []
        for ids, result in zip(
            ranges, map_in_order(functools.partial(function, images), ranges, workers), strict=True
        ):
            results.append(result)
            num_done += len(ids)
            progress(num_done, num_images)
        return results

    hashes_by_set = [_ImageHashes.join(map_ranges(_hash_range, images)) for images in test_indexes]
    thresholds = [own_threshold(hashes) if threshold is None else threshold for hashes in hashes_by_set]
    test_images = _TestImages(hashes_by_set, thresholds)
    training = map_ranges(functools.partial(_match_range, test_images), index)
    test_sets = tuple(
        ComparedSet(
            name=redact(name),
            index=images,
            threshold=own,
            unreadable=len(hashes.damage),
            flat=hashes.num_flat,
        )
        for name, images, hashes, own in zip(against, test_indexes, hashes_by_set, thresholds, strict=True)
    )
    damage = (sentence for part in training for sentence in part.damage)
    return Duplicates(
        index=index,
        test_sets=test_sets,
        pairs=tuple(pair for part in training for pair in part.matches),
        unreadable=sum(part.unreadable for part in training),
        flat=sum(part.flat for part in training),
        damage=tuple(itertools.islice(damage, NUM_LISTED_DAMAGE)),
    )


def _check_options(against: Sequence[str], threshold: int | None, workers: int) -> None:
    if threshold is not None and not 0 <= threshold <= MAX_THRESHOLD:
        raise ConfigError(
            f"--threshold {threshold} is not within 0 to {MAX_THRESHOLD}: the hashes of different images "
            f"differ in about {BITS // 2} of {BITS} bits; leave it out"
        )
    if workers < 0:
        raise ConfigError(f"--workers {workers} must not be negative; 0 starts no worker processes")
    if not against:
        raise ConfigError("there is no test set to compare with; name one with --against TEST")


@dataclasses.dataclass(frozen=True)
class _ImageHashes:
    """What images are compared by; zeros where an image is unreadable or flat.

    digests: of the decoded pixels. 64 bits suffice: 14 million images compared with 1 million
        collide by chance in one of 10^6 runs.
    detailed: whether an image has enough detail for its perceptual hash to mean anything.
    damage: one sentence for each unreadable image.
    """

    keys: list[str]
    digests: UInt64[np.ndarray, " n"]
    hashes: UInt64[np.ndarray, "n 2"]
    mirrored: UInt64[np.ndarray, "n 2"]
    readable: Bool[np.ndarray, " n"]
    detailed: Bool[np.ndarray, " n"]
    damage: list[str]

    @property
    def num_flat(self) -> int:
        return int((self.readable & ~self.detailed).sum())

    @classmethod
    def join(cls, parts: Sequence["_ImageHashes"]) -> "_ImageHashes":
        return cls(
            keys=[key for part in parts for key in part.keys],
            digests=np.concatenate([part.digests for part in parts]),
            hashes=np.concatenate([part.hashes for part in parts]),
            mirrored=np.concatenate([part.mirrored for part in parts]),
            readable=np.concatenate([part.readable for part in parts]),
            detailed=np.concatenate([part.detailed for part in parts]),
            damage=[sentence for part in parts for sentence in part.damage],
        )


def own_threshold(images: _ImageHashes) -> int:
    """The largest threshold that tells the images of a test set apart, within bounds.

    One half of the images, drawn at random, is compared with the other and its mirror images.
    """
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(images.detailed))
    stored, queried = np.array_split(drawn, 2)
    hashes = np.concatenate([images.hashes[stored], images.mirrored[stored]])
    table = HashTable(hashes, np.full(len(hashes), THRESHOLD, dtype=np.uint8))
    _, distances = table.nearest(images.hashes[queried])
    near = np.sort(distances[distances >= 0])
    num_allowed = max(1, int(ALIKE_SHARE * len(queried)))
    return THRESHOLD if len(near) <= num_allowed else max(LEAST_THRESHOLD, int(near[num_allowed]) - 1)


def _hash_range(index: Index, ids: range) -> _ImageHashes:
    keys, damage = [""] * len(ids), []
    digests = np.zeros(len(ids), dtype=np.uint64)
    grey = np.zeros((len(ids), SIDE, SIDE), dtype=np.float32)
    readable = np.zeros(len(ids), dtype=bool)
    for position, sample in enumerate(read_any(index, ids)):
        if isinstance(sample, BadSample):
            damage.append(f"{describe(index, ids[position])}: {sample.describe()}")
            continue
        try:
            pixels = decode(sample.image)
        except DamagedImage as error:
            damage.append(f"{shard_of(index, ids[position])}: sample {sample.key}: {error}")
            continue
        keys[position], readable[position] = sample.key, True
        digests[position], grey[position] = _pixel_digest(pixels), luminance(pixels)
    hashes, mirrored, detail = hash_luminance(grey)
    detailed = readable & (detail >= MIN_DETAIL)
    return _ImageHashes(keys, digests, hashes, mirrored, readable, detailed, damage)


def _pixel_digest(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    digest = xxhash.xxh3_64(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.intdigest()


@dataclasses.dataclass(frozen=True)
class _RangeMatches:
    """What a worker returns of a range of training images."""

    matches: list[Pair]
    unreadable: int
    flat: int
    damage: list[str]


class _TestImages:
    """The images of all test sets, ready for search. A row is an image's place among all."""

    def __init__(self, sets: Sequence[_ImageHashes], thresholds: Sequence[int]) -> None:
        images = _ImageHashes.join(sets)
        self.keys = images.keys
        readable = np.flatnonzero(images.readable)
        self.exact_rows = readable[np.argsort(images.digests[readable], kind="stable")]
        self.digests = images.digests[self.exact_rows]  # ascending
        detailed = np.flatnonzero(images.detailed)
        # The table holds each detailed image twice: as it is, then as its mirror image.
        self.near_rows = np.concatenate([detailed, detailed])
        hashes = np.concatenate([images.hashes[detailed], images.mirrored[detailed]])
        self.sizes = [len(part.keys) for part in sets]
        self.ends = np.cumsum(self.sizes)
        own = np.repeat(np.array(thresholds, dtype=np.uint8), self.sizes)
        self.table = HashTable(hashes, own[self.near_rows])

    def match(self, images: _ImageHashes, ids: range) -> list[Pair]:
        """The nearest test image of each image that has one; the first of equally near ones."""
        place = np.searchsorted(self.digests, images.digests)  # [n]
        padded = np.append(self.digests, np.uint64(0))  # where a digest is above all of ours
        exact = images.readable & (padded[place] == images.digests)
        queried = np.flatnonzero(images.detailed & ~exact)
        positions, distances = self.table.nearest(images.hashes[queried])
        results = zip(queried.tolist(), positions.tolist(), distances.tolist(), strict=True)
        nearest = {image: (position, distance) for image, position, distance in results if position >= 0}
        matches = []
        for image in sorted({*np.flatnonzero(exact).tolist(), *nearest}):
            if exact[image]:
                row, distance, mirrored = self.exact_rows[place[image]], 0, False
            else:
                position, distance = nearest[image]
                row, mirrored = self.near_rows[position], position >= len(self.near_rows) // 2
            test_set = int(np.searchsorted(self.ends, row, side="right"))
            matches.append(
                Pair(
                    train_id=ids[image],
                    train_key=images.keys[image],
                    test_set=test_set,
                    test_id=int(row - self.ends[test_set] + self.sizes[test_set]),
                    test_key=self.keys[row],
                    distance=distance,
                    exact=bool(exact[image]),
                    mirrored=mirrored,
                )
            )
        return matches


def _match_range(test_images: _TestImages, index: Index, ids: range) -> _RangeMatches:
    images = _hash_range(index, ids)
    return _RangeMatches(
        matches=test_images.match(images, ids),
        unreadable=len(images.damage),
        flat=images.num_flat,
        damage=images.damage[:NUM_LISTED_DAMAGE],
    )
