"""Small real shards for the tests: JPEGs in plain tars, and their index."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale.data.index import build_index


def jpeg(seed: int, size: int = 16) -> bytes:
    """A small JPEG that differs for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of (name, content)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: Sequence[int], num_classes: int = 5, size: int = 16) -> list[str]:
    """Shards with the given numbers of samples; sample i of the set has the class i % num_classes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += [
                (f"s{number:05d}.jpg", jpeg(number, size)),
                (f"s{number:05d}.cls", str(number % num_classes).encode()),
            ]
            number += 1
        paths.append(str(write_tar(folder / f"train-{shard:06d}.tar", members)))
    return paths


def write_index(
    folder: Path, counts: Sequence[int], chunk_samples: int = 4, num_classes: int = 5, size: int = 16
) -> Path:
    """write_shards and their index.json."""
    build_index(write_shards(folder, counts, num_classes, size), chunk_samples=chunk_samples).save(
        folder / "index.json"
    )
    return folder / "index.json"
