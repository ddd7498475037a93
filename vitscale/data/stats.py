"""A data set in words and bars: counts, sizes, labels, resolutions."""

import collections
import io

import numpy as np
from PIL import Image

from vitscale.data.index import DataError, Index
from vitscale.data.reader import read_samples

SAMPLED = 2000
ROWS = 20
BAR = 40


def describe(index: Index) -> str:
    """The text of `tools/data.py stats`; resolutions and sizes are those of up to 2,000 samples."""
    ids = np.unique(np.linspace(0, index.num_samples - 1, min(SAMPLED, index.num_samples)).astype(int))
    sizes, image_bytes = [], []
    for sample_id in ids.tolist():
        try:
            sample = next(read_samples(index, [sample_id]))
            with Image.open(io.BytesIO(sample.image), formats=("JPEG", "PNG", "WEBP")) as image:
                sizes.append(image.size)
            image_bytes.append(len(sample.image))
        except (DataError, OSError):
            continue  # counted below, as what is missing from `sizes`
    lines = [
        f"samples            {index.num_samples:,} ({index.num_damaged:,} damaged when indexed)",
        f"shards             {len(index.shards):,}",
        f"bytes              {index.num_bytes:,}",
        f"bytes per image    {sum(image_bytes) / max(1, len(image_bytes)):,.0f} (of {len(image_bytes):,} "
        f"read, {len(ids) - len(image_bytes):,} unreadable)",
        f"classes            {len(index.label_counts):,}, the highest is {index.max_label:,}",
        f"labels per sample  at most {index.max_labels}",
        "",
        "label          samples",
        *_bars(collections.Counter(index.label_counts)),
        "",
        "short side     images",
        *_bars(collections.Counter(min(size) for size in sizes)),
    ]
    return "\n".join(lines)


def _bars(counts: collections.Counter[int]) -> list[str]:
    """The most frequent values with their counts as bars, in rising order of the value."""
    shown = sorted(counts.most_common(ROWS))
    most = max(counts.values(), default=1)
    lines = [
        f"{value:<10,} {count:>10,}  {'#' * max(1, round(BAR * count / most))}" for value, count in shown
    ]
    return lines + ([f"and {len(counts) - ROWS:,} more"] if len(counts) > ROWS else [])
