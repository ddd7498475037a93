"""What deduplication found: the list of training images to leave out, and a sheet of pairs for a person to
judge.
"""

import bisect
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitscale import storage
from vitscale.config import ConfigError
from vitscale.data.decode import decode
from vitscale.data.index import DataError, Index
from vitscale.data.reader import read_samples

FORMAT, VERSION = "vitscale-exclude", 1
LISTED_PAIRS = 1000
SHEET_PAIRS = 24
_COLUMNS, _PICTURE, _GAP, _MARGIN, _HEADER = 4, 176, 4, 16, 52
_CELL = (2 * _PICTURE + _GAP + _MARGIN, _PICTURE + 80)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedSet:
    """A test set, and how many of its images could not be decoded or were too plain for a perceptual hash."""

    name: str
    index: Index
    unreadable: int
    flat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A training image and the test image nearest to it. `distance` is in bits of 128, 0 for exact copies."""

    train_id: int
    train_key: str
    test_set: ComparedSet
    test_id: int
    test_key: str
    distance: int
    exact: bool
    mirrored: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The training images that are copies of test images: one pair for each, in the order of their ids.

    unreadable: training images that cannot be decoded, the first of them in words in `damage`; flat: those
    too plain for a perceptual hash, which were compared exactly only.
    """

    index: Index
    test_sets: tuple[ComparedSet, ...]
    threshold: int
    pairs: tuple[Pair, ...]
    unreadable: int
    flat: int
    damage: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write the list for load_exclusions, and in it the LISTED_PAIRS closest pairs, for people."""
        closest = sorted(self.pairs, key=lambda pair: (not pair.exact, pair.distance, pair.train_id))
        values = {
            "format": FORMAT,
            "version": VERSION,
            "index_fingerprint": self.index.fingerprint(),
            "threshold": self.threshold,
            "num_samples": self.index.num_samples,
            "against": [_set_to_json(test_set) for test_set in self.test_sets],
            "unreadable": self.unreadable,
            "flat": self.flat,
            "damage": self.damage,
            "pairs": [_pair_to_json(self.index, pair) for pair in closest[:LISTED_PAIRS]],
            "ids": [pair.train_id for pair in self.pairs],
        }
        storage.write_atomic(path, json.dumps(values, indent=1).encode())


def load_exclusions(path: str, index: Index) -> Int64[np.ndarray, " n"]:
    """The sample ids of `index` that a list of Duplicates.save leaves out, rising.

    Raises DataError for a list that is missing, damaged, not one, or made for other shards.
    """
    remake = f"make it with: python tools/data.py dedup INDEX --against TEST --out {path}"
    try:
        values = json.loads(storage.read_bytes(path))
        kind, fingerprint, ids = (
            f"{values['format']} {values['version']}",
            values["index_fingerprint"],
            values["ids"],
        )
    except FileNotFoundError:
        raise DataError(f"exclusion list {path} is missing; {remake}") from None
    except OSError as error:
        raise DataError(
            f"exclusion list {path} cannot be read: {error.strerror or error}; {remake}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{path} is damaged, or not an exclusion list; {remake}") from None
    if kind != f"{FORMAT} {VERSION}":
        raise DataError(f"{path} is of the format {kind}, not {FORMAT} {VERSION}; {remake}")
    if fingerprint != index.fingerprint():
        raise DataError(
            f"exclusion list {path} was made for other shards (fingerprint {fingerprint}, this index has "
            f"{index.fingerprint()}); {remake}"
        )
    bounded = isinstance(ids, list) and all(type(one) is int and 0 <= one < index.num_samples for one in ids)
    if not bounded or any(one >= following for one, following in itertools.pairwise(ids)):
        raise DataError(
            f"{path} is damaged: its ids do not rise within the {index.num_samples:,} samples; {remake}"
        )
    return np.array(ids, dtype=np.int64)


def contact_sheet(duplicates: Duplicates, num_pairs: int = SHEET_PAIRS) -> Image.Image:
    """The most doubtful pairs side by side, the farthest first: is the threshold too high?

    Exact copies come last. Reads the images of both sets again.
    """
    doubtful = sorted(duplicates.pairs, key=lambda pair: (pair.exact, -pair.distance, pair.train_id))[
        :num_pairs
    ]
    num_rows = math.ceil(len(doubtful) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0] + _MARGIN, _HEADER + num_rows * _CELL[1]), "white")
    title = (
        f"The {len(doubtful)} most doubtful of {len(duplicates.pairs):,} copies, threshold "
        f"{duplicates.threshold} bits: training image left, test image right"
    )
    _write(ImageDraw.Draw(sheet), (_MARGIN, 14), title, size=20, width=sheet.width - 2 * _MARGIN)
    for number, pair in enumerate(doubtful):
        row, column = divmod(number, _COLUMNS)
        _draw_pair(sheet, (_MARGIN + column * _CELL[0], _HEADER + row * _CELL[1]), duplicates.index, pair)
    return sheet


def _draw_pair(sheet: Image.Image, corner: tuple[int, int], index: Index, pair: Pair) -> None:
    left, top = corner
    for place, (data, number) in enumerate([(index, pair.train_id), (pair.test_set.index, pair.test_id)]):
        picture = Image.fromarray(decode(next(read_samples(data, [number])).image))
        picture = ImageOps.contain(picture, (_PICTURE, _PICTURE), Image.Resampling.BICUBIC)
        box = left + place * (_PICTURE + _GAP)
        sheet.paste("#e8e8e8", (box, top, box + _PICTURE, top + _PICTURE))
        sheet.paste(picture, (box + (_PICTURE - picture.width) // 2, top + (_PICTURE - picture.height) // 2))
    distance = "exact copy" if pair.exact else f"{pair.distance} bits apart" + ", mirrored" * pair.mirrored
    width = 2 * _PICTURE + _GAP
    draw = ImageDraw.Draw(sheet)
    _write(draw, (left, top + _PICTURE + 5), distance, size=17, width=width)
    _write(draw, (left, top + _PICTURE + 28), f"train {pair.train_key}", size=15, width=width)
    set_name = pair.test_set.name.rpartition("/")[2]
    _write(draw, (left, top + _PICTURE + 47), f"test {pair.test_key} in {set_name}", size=15, width=width)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, *, size: int, width: int) -> None:
    """One line, its middle left out where it is wider than `width`."""
    font = ImageFont.load_default(size)
    shown, kept = text, len(text)
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]} ... {text[len(text) - (kept + 1) // 2 :]}"
    draw.text(corner, shown, fill="black", font=font)


def _set_to_json(test_set: ComparedSet) -> dict[str, Any]:
    return {
        "set": test_set.name,
        "index_fingerprint": test_set.index.fingerprint(),
        "num_samples": test_set.index.num_samples,
        "unreadable": test_set.unreadable,
        "flat": test_set.flat,
    }


def _pair_to_json(index: Index, pair: Pair) -> dict[str, Any]:
    return {
        "id": pair.train_id,
        "key": pair.train_key,
        "shard": shard_of(index, pair.train_id),
        "match": {"set": pair.test_set.name, "id": pair.test_id, "key": pair.test_key},
        "distance": pair.distance,
        "exact": pair.exact,
        "mirrored": pair.mirrored,
    }


def shard_of(index: Index, sample_id: int) -> str:
    ends = list(itertools.accumulate(shard.num_samples for shard in index.shards))
    return index.shards[bisect.bisect_right(ends, sample_id)].url
