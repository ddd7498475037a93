"""Which training images are copies of test images, so that training can leave them out.

The ViT paper takes out of its pretraining data what is near its downstream test sets (section 4.1). The
test
sets are hashed and held, about 300 bytes an image; the training set streams past them through worker
processes, and only what was found comes back. An image is an exact copy if its decoded pixels are equal
(so
the same picture in another container counts, and a file rewritten without its EXIF data). It is a near
copy
if its perceptual hash is near that of the test image or of its mirror image: training flips images, so a
mirrored copy leaks as much. A killed run starts over; the result is the same for any number of workers.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import xxhash
from jaxtyping import Bool, UInt8, UInt64

from vitscale import storage
from vitscale.config import ConfigError
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.duplicates import ComparedSet, Duplicates, Pair, shard_of
from vitscale.data.index import DataError, Index, build_index
from vitscale.data.phash import BITS, MAX_THRESHOLD, MIN_DETAIL, SIDE, HashTable, hash_luminance, luminance
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample
from vitscale.processes import map_in_order

THRESHOLD = 24
LISTED_DAMAGE = 20
_RANGE = 512  # images in a task: half a second of work; a chunk across its border is read twice

T = TypeVar("T")
Progress = Callable[[int, int], None]


def find_duplicates(
    index: Index,
    against: Sequence[str],
    *,
    threshold: int = THRESHOLD,
    workers: int = 0,
    progress: Progress | None = None,
) -> Duplicates:
    """Compare every training image with test sets: index.json files, or shards by glob, brace pattern or
    URL.

    threshold: in how many of 128 bits the hashes of copies may differ, 0 to 32. workers: processes; 0
    works
    in this one. `progress` is told the images just done and the number of all, test images included.
    Raises
    ConfigError or DataError for what is missing; damaged samples are counted and passed over.
    """
    _check(against, threshold, workers)
    indexes = [open_set(pattern) for pattern in against]
    total = sum(one.num_samples for one in (index, *indexes))

    def run(job: Callable[[Index, range], T], over: Index) -> list[T]:
        ranges = [range(at, min(at + _RANGE, over.num_samples)) for at in range(0, over.num_samples, _RANGE)]
        results = []
        for ids, result in zip(
            ranges, map_in_order(functools.partial(job, over), ranges, workers), strict=True
        ):
            results.append(result)
            if progress:
                progress(len(ids), total)
        return results

    hashed = [_Hashed.join(run(_hash_range, one)) for one in indexes]
    references = _References(_Hashed.join(hashed), threshold)
    found = run(functools.partial(_match_range, references), index)
    sets = [
        ComparedSet(name=name, index=one, unreadable=len(part.damage), flat=part.num_flat)
        for name, one, part in zip(against, indexes, hashed, strict=True)
    ]
    return Duplicates(
        index=index,
        test_sets=tuple(sets),
        threshold=threshold,
        pairs=tuple(references.pair(match, sets) for part in found for match in part.matches),
        unreadable=sum(part.unreadable for part in found),
        flat=sum(part.flat for part in found),
        damage=tuple(itertools.islice((text for part in found for text in part.damage), LISTED_DAMAGE)),
    )


def open_set(pattern: str) -> Index:
    """An index.json, or plain shards, which are then indexed in memory."""
    return Index.load(pattern) if pattern.endswith(".json") else build_index(storage.expand(pattern))


def _check(against: Sequence[str], threshold: int, workers: int) -> None:
    if not 0 <= threshold <= MAX_THRESHOLD:
        raise ConfigError(
            f"threshold {threshold} is not within 0 to {MAX_THRESHOLD}: the hashes of different images "
            f"differ in about {BITS // 2} of {BITS} bits; use {THRESHOLD}"
        )
    if workers < 0:
        raise ConfigError(f"workers {workers} must not be negative; 0 works without processes of its own")
    if not against:
        raise ConfigError("there is no test set to compare with; name one with --against TEST")


@dataclasses.dataclass(frozen=True)
class _Hashed:
    """Images as they are compared. What is unreadable or flat has zeros where it has no value."""

    keys: list[str]
    digests: UInt64[
        np.ndarray, " n"
    ]  # 64 bits: 14 million x 1 million images agree by chance once in 10^6 runs
    hashes: UInt64[np.ndarray, "n 2"]
    mirrored: UInt64[np.ndarray, "n 2"]
    readable: Bool[np.ndarray, " n"]
    detailed: Bool[np.ndarray, " n"]
    damage: list[str]

    @property
    def num_flat(self) -> int:
        return int((self.readable & ~self.detailed).sum())

    @classmethod
    def join(cls, parts: Sequence["_Hashed"]) -> "_Hashed":
        return cls(
            keys=[key for part in parts for key in part.keys],
            digests=np.concatenate([part.digests for part in parts]),
            hashes=np.concatenate([part.hashes for part in parts]),
            mirrored=np.concatenate([part.mirrored for part in parts]),
            readable=np.concatenate([part.readable for part in parts]),
            detailed=np.concatenate([part.detailed for part in parts]),
            damage=[text for part in parts for text in part.damage],
        )


def _hash_range(index: Index, ids: range) -> _Hashed:
    keys, damage = [""] * len(ids), []
    digests = np.zeros(len(ids), dtype=np.uint64)
    grey = np.zeros((len(ids), SIDE, SIDE), dtype=np.float32)
    readable = np.zeros(len(ids), dtype=bool)
    for number, sample in enumerate(_read_each(index, ids)):
        if isinstance(sample, DataError):
            damage.append(str(sample))
            continue
        try:
            pixels = decode(sample.image)
        except DamagedImage as error:
            damage.append(f"{shard_of(index, ids[number])}: sample {sample.key}: {error}")
            continue
        keys[number], readable[number] = sample.key, True
        digests[number], grey[number] = _digest(pixels), luminance(pixels)
    hashes, mirrored, detail = hash_luminance(grey)
    return _Hashed(keys, digests, hashes, mirrored, readable, readable & (detail >= MIN_DETAIL), damage)


def _read_each(index: Index, ids: range) -> Iterator[RawSample | DataError]:
    """Every sample, or why it cannot be read."""
    start = ids.start
    while start < ids.stop:
        try:
            for sample in read_samples(index, range(start, ids.stop)):
                yield sample
                start += 1
        except DataError as error:
            yield error
            start += 1


def _digest(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    digest = xxhash.xxh3_64(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.intdigest()


@dataclasses.dataclass(frozen=True)
class _Match:
    train_id: int
    train_key: str
    row: int
    distance: int
    exact: bool
    mirrored: bool


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a range of training images comes back as."""

    matches: list[_Match]
    unreadable: int
    flat: int
    damage: list[str]


class _References:
    """The images of all test sets, by row, made ready to be searched."""

    def __init__(self, hashed: _Hashed, threshold: int) -> None:
        self.keys = hashed.keys
        readable = np.flatnonzero(hashed.readable)
        order = readable[np.argsort(hashed.digests[readable], kind="stable")]
        self.exact_rows, self.digests = order, hashed.digests[order]
        rows = np.flatnonzero(hashed.detailed)
        self.near_rows = np.concatenate([rows, rows])
        self.table = HashTable(np.concatenate([hashed.hashes[rows], hashed.mirrored[rows]]), threshold)

    def match(self, hashed: _Hashed, ids: range) -> list[_Match]:
        """The nearest test image of each training image that has one; of equally near ones the first."""
        place = np.searchsorted(self.digests, hashed.digests)
        padded = np.append(self.digests, np.uint64(0))
        exact = hashed.readable & (place < len(self.digests)) & (padded[place] == hashed.digests)
        asked = np.flatnonzero(hashed.detailed & ~exact)
        number, distance = self.table.nearest(hashed.hashes[asked])
        near = {int(i): (int(n), int(d)) for i, n, d in zip(asked, number, distance, strict=True) if n >= 0}
        matches = []
        for i in sorted({*np.flatnonzero(exact).tolist(), *near}):
            row = self.exact_rows[place[i]] if exact[i] else self.near_rows[near[i][0]]
            flipped = not exact[i] and near[i][0] * 2 >= len(self.near_rows)
            bits = 0 if exact[i] else near[i][1]
            matches.append(_Match(ids[i], hashed.keys[i], int(row), bits, bool(exact[i]), flipped))
        return matches

    def pair(self, match: _Match, sets: Sequence[ComparedSet]) -> Pair:
        ends = list(itertools.accumulate(test_set.index.num_samples for test_set in sets))
        number = bisect.bisect_right(ends, match.row)
        return Pair(
            train_id=match.train_id,
            train_key=match.train_key,
            test_set=sets[number],
            test_id=match.row - (ends[number] - sets[number].index.num_samples),
            test_key=self.keys[match.row],
            distance=match.distance,
            exact=match.exact,
            mirrored=match.mirrored,
        )


def _match_range(references: _References, index: Index, ids: range) -> _Found:
    hashed = _hash_range(index, ids)
    return _Found(
        matches=references.match(hashed, ids),
        unreadable=len(hashed.damage),
        flat=hashed.num_flat,
        damage=hashed.damage[:LISTED_DAMAGE],
    )
