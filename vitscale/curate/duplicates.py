"""What deduplication results in: a list for training to exclude, and pairs to judge by eye."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitscale.data.decode import decode
from vitscale.data.exclusions import FORMAT, VERSION
from vitscale.data.index import Index
from vitscale.data.reader import read_samples
from vitscale.redaction import redact
from vitscale.system import atomic

NUM_LISTED_PAIRS = 1000
NUM_SHEET_PAIRS = 24
# The contact sheet, in pixels: a cell holds the two pictures of a pair and three lines of text.
_COLUMNS, _PICTURE, _GAP, _MARGIN, _HEADER = 4, 176, 4, 16, 52
_CELL = (2 * _PICTURE + _GAP + _MARGIN, _PICTURE + 80)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedSet:
    """A test set, and how many of its images are unreadable or too flat for a hash.

    threshold: in how many of 128 bits the hash of a copy may differ from that of its image.
    """

    name: str
    index: Index
    threshold: int
    unreadable: int
    flat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A training image and the test image nearest to it.

    test_set: its number among Duplicates.test_sets.
    distance: how many of the 128 bits of their hashes differ; 0 for exact copies.
    mirrored: whether the nearest is the mirror image of the test image.
    """

    train_id: int
    train_key: str
    test_set: int
    test_id: int
    test_key: str
    distance: int
    exact: bool
    mirrored: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The training images that are copies of test images: one pair each, in the order of ids.

    unreadable: how many training images cannot be decoded; `damage` describes the first.
    flat: how many are too plain for a perceptual hash, so that only exact copies count.
    """

    index: Index
    test_sets: tuple[ComparedSet, ...]
    pairs: tuple[Pair, ...]
    unreadable: int
    flat: int
    damage: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write the list that load_exclusions reads; it also shows people the closest pairs."""
        closest = sorted(self.pairs, key=lambda pair: (not pair.exact, pair.distance, pair.train_id))
        values = {
            "format": FORMAT,
            "version": VERSION,
            "index_fingerprint": self.index.fingerprint(),
            "num_samples": self.index.num_samples,
            "against": [_set_to_json(test_set) for test_set in self.test_sets],
            "unreadable": self.unreadable,
            "flat": self.flat,
            "damage": self.damage,
            "pairs": [_pair_to_json(self, pair) for pair in closest[:NUM_LISTED_PAIRS]],
            "ids": [pair.train_id for pair in self.pairs],
        }
        atomic.write(path, json.dumps(values, indent=1).encode())


def contact_sheet(duplicates: Duplicates, num_pairs: int = NUM_SHEET_PAIRS) -> Image.Image:
    """Draw the most doubtful pairs, which show whether the threshold is too high.

    The pairs farthest apart come first, exact copies last. Their images are read again.
    """
    by_doubt = sorted(duplicates.pairs, key=lambda pair: (pair.exact, -pair.distance, pair.train_id))
    doubtful = by_doubt[:num_pairs]
    num_rows = math.ceil(len(doubtful) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0] + _MARGIN, _HEADER + num_rows * _CELL[1]), "white")
    title = (
        f"The {len(doubtful)} most doubtful of {len(duplicates.pairs):,} candidates: training image left, "
        "test image right"
    )
    _write(ImageDraw.Draw(sheet), (_MARGIN, 14), title, size=20, width=sheet.width - 2 * _MARGIN)
    for cell, pair in enumerate(doubtful):
        row, column = divmod(cell, _COLUMNS)
        _draw_pair(sheet, (_MARGIN + column * _CELL[0], _HEADER + row * _CELL[1]), duplicates, pair)
    return sheet


def _draw_pair(sheet: Image.Image, corner: tuple[int, int], duplicates: Duplicates, pair: Pair) -> None:
    (left, top), test_set = corner, duplicates.test_sets[pair.test_set]
    sources = [(duplicates.index, pair.train_id), (test_set.index, pair.test_id)]
    for side, (data, sample_id) in enumerate(sources):
        picture = Image.fromarray(decode(next(read_samples(data, [sample_id])).image))
        picture = ImageOps.contain(picture, (_PICTURE, _PICTURE), Image.Resampling.BICUBIC)
        box = left + side * (_PICTURE + _GAP)
        sheet.paste("#e8e8e8", (box, top, box + _PICTURE, top + _PICTURE))
        sheet.paste(picture, (box + (_PICTURE - picture.width) // 2, top + (_PICTURE - picture.height) // 2))
    width = 2 * _PICTURE + _GAP
    draw = ImageDraw.Draw(sheet)
    _write(draw, (left, top + _PICTURE + 5), _distance_text(pair), size=17, width=width)
    _write(draw, (left, top + _PICTURE + 28), f"train {pair.train_key}", size=15, width=width)
    set_name = test_set.name.rpartition("/")[2]
    _write(draw, (left, top + _PICTURE + 47), f"test {pair.test_key} in {set_name}", size=15, width=width)


def _distance_text(pair: Pair) -> str:
    if pair.exact:
        return "exact copy"
    mirrored = ", mirrored" if pair.mirrored else ""
    return f"{pair.distance} bits apart{mirrored}"


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, *, size: int, width: int) -> None:
    """Write one line; where it is wider than `width`, dots replace its middle."""
    font = ImageFont.load_default(size)
    shown, kept = text, len(text)
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]} ... {text[len(text) - (kept + 1) // 2 :]}"
    draw.text(corner, shown, fill="black", font=font)


def _set_to_json(test_set: ComparedSet) -> dict[str, Any]:
    return {
        "set": test_set.name,
        "threshold": test_set.threshold,
        "index_fingerprint": test_set.index.fingerprint(),
        "num_samples": test_set.index.num_samples,
        "unreadable": test_set.unreadable,
        "flat": test_set.flat,
    }


def _pair_to_json(duplicates: Duplicates, pair: Pair) -> dict[str, Any]:
    return {
        "id": pair.train_id,
        "key": pair.train_key,
        "shard": shard_of(duplicates.index, pair.train_id),
        "match": {"set": duplicates.test_sets[pair.test_set].name, "id": pair.test_id, "key": pair.test_key},
        "distance": pair.distance,
        "exact": pair.exact,
        "mirrored": pair.mirrored,
    }


def shard_of(index: Index, sample_id: int) -> str:
    """The URL of the shard that holds a sample."""
    return redact(index.shards[index.layout.shard_of(index.layout.chunk_with(sample_id))].url)
