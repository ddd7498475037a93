"""Describes a data set as text and as a picture: counts, sizes, labels, resolutions."""

import collections
import dataclasses
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitscale.data.index import Index
from vitscale.data.order import ShardLayout
from vitscale.data.reader import read_any
from vitscale.data.samples import BadSample
from vitscale.stores import storage

NUM_SAMPLED = 2000
NUM_PER_CHUNK = 8  # images, where there are enough chunks
NUM_ROWS = 20  # of a text histogram, whose longest bar has BAR_CHARACTERS
BAR_CHARACTERS = 40
NUM_BINS = 40  # of a drawn histogram
_PANEL = (760, 300)  # width and height of a drawn histogram in pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What the index says of the whole set, and the sizes of the images that were sampled.

    short_sides (in pixels), megapixels, image_bytes: one entry for each sampled image that
    could be opened; `unreadable` of them could not.
    """

    index: Index
    short_sides: tuple[int, ...]
    megapixels: tuple[float, ...]
    image_bytes: tuple[int, ...]
    unreadable: int


def measure(index: Index) -> Stats:
    """Read the headers of up to 2,000 images of chunks that are spread evenly over the set."""
    ids = _spread_ids(index.layout)
    sizes, image_bytes = [], []
    for sample in read_any(index, ids):
        if isinstance(sample, BadSample):
            continue
        try:
            with Image.open(io.BytesIO(sample.image), formats=("JPEG", "PNG", "WEBP")) as image:
                sizes.append(image.size)
            image_bytes.append(len(sample.image))
        except MemoryError:
            raise
        except Exception:  # what Pillow raises for damage is of any kind
            continue
    return Stats(
        index=index,
        short_sides=tuple(min(size) for size in sizes),
        megapixels=tuple(width * height / 1e6 for width, height in sizes),
        image_bytes=tuple(image_bytes),
        unreadable=len(ids) - len(sizes),
    )


def _spread_ids(layout: ShardLayout) -> list[int]:
    """Up to NUM_SAMPLED samples in rising order, several of each chunk that has to be read."""
    if layout.num_samples <= NUM_SAMPLED:
        return list(range(layout.num_samples))
    num_chunks = min(layout.num_chunks, NUM_SAMPLED // min(NUM_PER_CHUNK, layout.chunk_samples))
    of_chunk = np.arange(NUM_SAMPLED // num_chunks)  # [m]
    chunks = np.linspace(0, layout.num_chunks - 1, num_chunks).astype(int)
    first_ids, counts = layout.spans(chunks)  # [num_chunks] each
    ids = first_ids[:, None] + counts[:, None] * of_chunk // len(of_chunk)  # [num_chunks, m]
    return np.unique(ids).tolist()


def describe(stats: Stats) -> str:
    """The text that `tools/data.py stats` prints."""
    index, num_read = stats.index, len(stats.image_bytes)
    shards = sorted(shard.num_samples for shard in index.shards)
    lines = [
        f"samples            {index.num_samples:,} ({index.num_damaged:,} damaged when indexed)",
        f"shards             {len(shards):,} of {shards[0]:,} to {shards[-1]:,} samples",
        f"bytes              {index.num_bytes:,}",
        f"bytes per image    {sum(stats.image_bytes) / max(1, num_read):,.0f} "
        f"(of {num_read:,} read, {stats.unreadable:,} unreadable)",
        f"megapixels         {sum(stats.megapixels) / max(1, num_read):,.2f} on average",
        f"classes            {len(index.label_counts):,}, the highest is {index.max_label:,}",
        f"samples per class  {min(index.label_counts.values()):,} to {max(index.label_counts.values()):,}",
        f"labels per sample  at most {index.max_labels}",
        *_neighbours(index),
        "",
        "label          samples",
        *_bars(collections.Counter(index.label_counts)),
        "",
        "short side     images",
        *_bars(collections.Counter(stats.short_sides)),
    ]
    return "\n".join(lines)


def doubts(index: Index, path: str | Path) -> list[str]:
    """What looks wrong in an index, one sentence each, with the way out. path: where it is."""
    sentences = index.describe_lone()
    num_repeated, first = index.repeated_keys
    if num_repeated:
        sentences.append(
            f"keys that occur again in their shard: {num_repeated:,}, the first in {first}; all samples are "
            "used, so remove those that are copies"
        )
    if index.neighbours.is_clustered:
        sentences.append(f"{index.neighbours.describe()}; {_reshuffle(index, path)}")
    return sentences


def _reshuffle(index: Index, path: str | Path) -> str:
    """How to write the shards again in random order."""
    copied = all(storage.is_local(shard.url) for shard in index.shards)
    source, out = ("INDEX", "OUT") if not copied else (str(path), str(Path(path).parent / "shuffled"))
    command = f"python tools/data.py pack {shlex.quote(source)} {shlex.quote(out)} --format shards"
    if copied:
        return f"write them again in random order: {command}"
    return f"copy them to a disk, index them there, and write them again in random order: {command}"


def _neighbours(index: Index) -> list[str]:
    """Not in indexes of earlier commits."""
    alike = index.neighbours
    line = f"in neighbours      {alike.mean:.2f} labels in common, {alike.chance:.2f} by chance"
    return [line] if alike.pairs else []


def draw(stats: Stats) -> Image.Image:
    """Draw three histograms: samples per class, largest first, short sides, image bytes."""
    counts = sorted(stats.index.label_counts.values(), reverse=True)
    groups = [int(np.mean(part)) for part in np.array_split(counts, min(NUM_BINS * 4, len(counts)))]
    sides, side_edges = np.histogram(stats.short_sides, NUM_BINS)
    sizes, size_edges = np.histogram(np.array(stats.image_bytes) / 1000, NUM_BINS)
    panels = [
        (f"samples of the {len(counts):,} classes, from the largest", groups, ("1", f"{len(counts):,}")),
        (f"short side of {len(stats.short_sides):,} images, pixels", sides.tolist(), _ends(side_edges)),
        (f"size of {len(stats.image_bytes):,} images, kB", sizes.tolist(), _ends(size_edges)),
    ]
    width, height = _PANEL
    sheet = Image.new("RGB", (width, 40 + height * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    title = f"{stats.index.num_samples:,} samples in {len(stats.index.shards):,} shards"
    pen.text((20, 12), title, fill="black", font=ImageFont.load_default(20))
    for panel, (name, values, ends) in enumerate(panels):
        _draw_panel(pen, 40 + panel * height, name, values, ends)
    return sheet


def _draw_panel(
    pen: ImageDraw.ImageDraw, top: int, name: str, values: Sequence[int], ends: tuple[str, str]
) -> None:
    width, height = _PANEL
    left, right, base, ceiling = 70, width - 20, top + height - 40, top + 50
    font = ImageFont.load_default(14)
    pen.text((20, top + 18), name, fill="black", font=font)
    most, step = max(values, default=0), (right - left) / max(1, len(values))
    for column, value in enumerate(values):
        x, y = left + column * step, base - (base - ceiling) * value / max(1, most)
        pen.rectangle((x, y, max(x, x + step - 1), base), fill=(62, 105, 172))
    pen.line((left, base, right, base), fill="black")
    pen.text((left - 8, ceiling), f"{most:,}", fill="black", font=font, anchor="rm")
    pen.text((left - 8, base), "0", fill="black", font=font, anchor="rm")
    pen.text((left, base + 8), ends[0], fill="black", font=font)
    pen.text((right, base + 8), ends[1], fill="black", font=font, anchor="ra")


def _ends(edges: np.ndarray) -> tuple[str, str]:
    return f"{edges[0]:,.0f}", f"{edges[-1]:,.0f}"


def _bars(counts: collections.Counter[int]) -> list[str]:
    """The most frequent values with their counts as bars, in ascending order of the values."""
    most = max(counts.values(), default=1)
    lines = []
    for value, count in sorted(counts.most_common(NUM_ROWS)):
        bar = "#" * max(1, round(BAR_CHARACTERS * count / most))
        lines.append(f"{value:<10,} {count:>10,}  {bar}")
    if len(counts) > NUM_ROWS:
        lines.append(f"and {len(counts) - NUM_ROWS:,} more")
    return lines
