"""Demo data without a network: drawn shapes for pretraining, handwritten digits for transfer.

A picture of shapes has several attributes: kind and colour (together its class), count,
position, and the direction of the background stripes. Each of the last three also labels a set
of its own, for transfer. Everything is deterministic.
"""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vitscale import rng
from vitscale.curate.pack.writer import write_shards
from vitscale.data.indexing import build_index
from vitscale.data.samples import RawSample
from vitscale.system import atomic

VERSION = 1
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "green": (46, 160, 67),
    "blue": (38, 99, 209),
    "purple": (142, 68, 173),
    "white": (245, 245, 245),
}
NUM_COUNTS = NUM_POSITIONS = NUM_ORIENTATIONS = 4
SIZE, SUPERSAMPLED = 48, 4
# Set, split, number of pictures, and the attribute that labels them.
SHAPE_SETS = (
    ("shapes", "train", 9000, "class"),
    ("shapes", "test", 1000, "class"),
    ("shapes-count", "train", 1000, "count"),
    ("shapes-count", "test", 500, "count"),
    ("shapes-position", "train", 1000, "position"),
    ("shapes-position", "test", 500, "position"),
    ("shapes-orientation", "train", 1000, "orientation"),
    ("shapes-orientation", "test", 500, "orientation"),
)
NUM_TRAIN_DIGITS, DIGIT_SIZE = 1297, 32


def make_demo(folder: Path) -> dict[str, int]:
    """Write the sets below `folder`, each with an index.json of its training shards.

    Returns the number of samples by "set/split". A folder that is complete is left as it is.
    """
    record = folder / "demo.json"  # written last
    if (complete := recorded(record)) is not None:
        return complete
    num_samples: dict[str, int] = {}
    for set_number, (name, split, count, label) in enumerate(SHAPE_SETS):
        samples = shape_samples(set_number, count, label)
        num_samples[f"{name}/{split}"] = _write_set(folder / name, split, samples)
    for split in ("train", "test"):
        num_samples[f"digits/{split}"] = _write_set(folder / "digits", split, digit_samples(split))
    atomic.write(record, json.dumps({"version": VERSION, "sets": num_samples}, indent=1).encode())
    return num_samples


def recorded(record: Path) -> dict[str, int] | None:
    """What was written, by the record of a complete folder; None without a whole record."""
    try:
        values = json.loads(record.read_bytes())
        return dict(values["sets"]) if values["version"] == VERSION else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None


def shape_samples(set_number: int, count: int, label: str) -> Iterator[RawSample]:
    """Yield `count` pictures labelled by "class", "count", "position" or "orientation"."""
    for picture_number in range(count):
        draws = rng.uniform(24, 0, "demo", set_number, picture_number)
        kind, colour = int(draws[0] * len(KINDS)), int(draws[1] * len(COLOURS))
        attributes = {
            "class": kind * len(COLOURS) + colour,
            "count": int(draws[2] * NUM_COUNTS),
            "position": int(draws[3] * NUM_POSITIONS),
            "orientation": int(draws[4] * NUM_ORIENTATIONS),
        }
        picture = draw_shapes(
            KINDS[kind],
            list(COLOURS)[colour],
            attributes["count"] + 1,
            attributes["position"],
            attributes["orientation"],
            draws[5:],
        )
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        key = f"shape_{set_number}_{picture_number:06d}"
        yield RawSample(key, buffer.getvalue(), "jpg", (attributes[label],))


def draw_shapes(
    kind: str, colour: str, count: int, position: int, orientation: int, draws: np.ndarray
) -> Image.Image:
    """Draw equal shapes in a 2 x 2 grid, clockwise from cell `position`, on faint stripes.

    draws: at least 6 + 3 * count numbers in [0, 1): for the tints, the phase of the stripes,
    the size, and the shift and turn of each shape.
    """
    side = SIZE * SUPERSAMPLED
    background = Image.fromarray(_background(orientation, draws[:4]))
    image = background.resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    radius = side * (0.13 + 0.06 * draws[4])
    tint = tuple(int(np.clip(c + 40 * (draws[5] - 0.5), 0, 255)) for c in COLOURS[colour])
    for shape in range(count):
        row, column = ((0, 0), (0, 1), (1, 1), (1, 0))[(position + shape) % 4]
        shift_x, shift_y, turn = draws[6 + 3 * shape : 9 + 3 * shape]
        x = side * (0.25 + 0.5 * column + 0.08 * (shift_x - 0.5))
        y = side * (0.25 + 0.5 * row + 0.08 * (shift_y - 0.5))
        _draw_shape(pen, kind, x, y, radius, 0.6 * (turn - 0.5), tint)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def digit_samples(split: str) -> Iterator[RawSample]:
    """Yield the digits bundled with scikit-learn, enlarged: 1,797 real images of 8 x 8 pixels.

    Source: UCI, Optical Recognition of Handwritten Digits.
    """
    from sklearn.datasets import load_digits

    pixels_and_labels = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels_and_labels[0]).reshape(-1, 8, 8), np.asarray(pixels_and_labels[1])
    order = rng.permutation(len(images), 0, "split")
    for position in order[:NUM_TRAIN_DIGITS] if split == "train" else order[NUM_TRAIN_DIGITS:]:
        pixels = np.round(images[position] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield RawSample(f"digit_{position:04d}", buffer.getvalue(), "png", (int(labels[position]),))


def _write_set(folder: Path, split: str, samples: Iterator[RawSample]) -> int:
    """Write a split, with an index if it is for training; return the number of samples."""
    shards = write_shards(samples, folder, split)
    index = build_index(shards)
    if split == "train":
        index.save(folder / "index.json")
    return index.num_samples


def _background(orientation: int, draws: np.ndarray) -> np.ndarray:
    """Faint stripes in one of four directions on a dark tint: uint8 [SIZE, SIZE, 3]."""
    angle = math.pi * orientation / NUM_ORIENTATIONS
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(
        (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi * 5 / SIZE + 2 * math.pi * draws[0]
    )
    tint = 40 + 60 * draws[1:4]
    return np.clip(tint + 18 * wave[..., None], 0, 255).astype(np.uint8)


def _draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, turn: float, fill: tuple[int, ...]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        pen.ellipse(box, fill=fill)
    elif kind == "ring":
        pen.ellipse(box, outline=fill, width=round(0.4 * radius))
    elif kind == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=round(0.55 * radius))
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.45)}[kind]
        points = []
        num_points = 2 * corners if kind == "star" else corners
        for point in range(num_points):
            angle = turn + 2 * math.pi * point / num_points - math.pi / 2
            reach = 1.15 * radius * (inner if kind == "star" and point % 2 else 1.0)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        pen.polygon(points, fill=fill)
