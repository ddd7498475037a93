"""Kaggle's diabetic retinopathy images, prepared as TFDS's config btgraham-300 does."""

import csv

import numpy as np
from jaxtyping import UInt8

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import Files, open_files
from vitscale.curate.pack.vtab.examples import Examples, make_listing, named
from vitscale.curate.pack.vtab.opencv import blur, decode_rgb, disc, encode_jpeg, resize
from vitscale.errors import DataError
from vitscale.vtab.tasks import TASKS

RADIUS = 300  # pixels that the eyeball gets
MASK_RADIUS = 270
QUALITY = 72
_TRAIN, _SOLUTION = "trainLabels.csv", "retinopathy_solution.csv"
_ADVICE = f"vtab/retinopathy reads a folder with train/NAME.jpeg, test/NAME.jpeg, {_TRAIN} and {_SOLUTION}"


def list_retinopathy(source: str, config: PackConfig) -> Listing:
    """The folders train/ and test/ with their tables; keys as 13816_right.

    The images of the validation split (Usage is Public) are in test/, too.
    """
    files = open_files(source, _ADVICE, ("train", "test"))
    splits = {}
    for split, table, usage in (
        ("train", _TRAIN, ""),
        ("validation", _SOLUTION, "Public"),
        ("test", _SOLUTION, "Private"),
    ):
        rows = _rows(files, table, usage)
        folder = "train" if split == "train" else "test"
        splits[split] = Examples(
            keys=[name for name, _ in rows],
            labels=[level for _, level in rows],
            images=named(files, [f"{folder}/{name}.jpeg" for name, _ in rows], table, prepare),
        )
    return make_listing(TASKS["retinopathy"], source, splits)


def prepare(image: bytes) -> bytes:
    """Scale the eyeball to one radius, subtract the local mean, mask and crop (TFDS 3.0.0).

    The steps of B. Graham, who won the competition in 2015. A damaged image can have no bright
    pixel in its middle row; half the height then counts as its radius.
    """
    pixels = decode_rgb(image)
    row = pixels[pixels.shape[0] // 2].sum(axis=1, dtype=np.int64)  # [W]
    radius = np.count_nonzero(row > row.mean() / 10) / 2
    if radius < 1:
        radius = pixels.shape[0] / 2
    return encode_jpeg(_mask_and_crop(_local_contrast(resize(pixels, RADIUS / radius))), QUALITY)


def _local_contrast(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    mean = blur(pixels, RADIUS / 30)
    return (4 * (pixels.astype(np.int64) - mean) + 128).clip(0, 255).astype(np.uint8)


def _mask_and_crop(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    height, width = pixels.shape[:2]
    masked = np.where(disc(height, width, MASK_RADIUS)[..., None], pixels, np.uint8(128))
    rows, columns = (
        slice(max(size // 2 - MASK_RADIUS, 0), size // 2 + MASK_RADIUS) for size in (height, width)
    )
    return masked[rows, columns]


def _rows(files: Files, table: str, usage: str) -> list[tuple[str, int]]:
    """Name and level of each row, of one Usage if `usage` is given."""
    rows = []
    for number, row in enumerate(csv.DictReader(files.lines(table)), 2):
        name, level = row.get("image"), row.get("level") or ""
        if not name or not level.strip().isdecimal() or (usage and not row.get("Usage")):
            header = "image,level,Usage" if usage else "image,level"
            raise DataError(
                f"line {number} of {table} in {files.source} is incomplete: its columns must be {header}, "
                "and the level a whole number; download it again"
            )
        if not usage or row["Usage"].strip() == usage:
            rows.append((name.strip(), int(level)))
    return rows
