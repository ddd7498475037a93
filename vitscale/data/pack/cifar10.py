"""CIFAR-10 as its authors publish it, in the binary version: https://www.cs.toronto.edu/~kriz/cifar.html

The python version of the archive is made of pickles, which vitscale never reads.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale import rng
from vitscale.config import ConfigError
from vitscale.data.samples import RawSample

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_RECORD = 1 + 3 * 32 * 32


def read_split(source: Path, split: str, seed: int | None) -> Iterator[RawSample]:
    """The samples of "train" (50,000) or "test" (10,000) as lossless PNG, shuffled by `seed` (None = as
    published).

    source: cifar-10-binary.tar.gz, or the folder that it unpacks to. Raises ConfigError for anything else.
    """
    records = np.concatenate([_read_batch(source, name) for name in BATCHES[split]])
    order = (
        range(len(records))
        if seed is None
        else rng.permutation(len(records), seed, "pack", int(split == "test"))
    )
    for number, position in enumerate(order):
        record = records[position]
        buffer = io.BytesIO()
        Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "PNG")
        yield RawSample(f"cifar10_{split}_{number:07d}", buffer.getvalue(), "png", (int(record[0]),))


def _read_batch(source: Path, name: str) -> np.ndarray:
    """The records of one batch file: uint8 [n, 3073], the label first, then the planes R, G, B."""
    data = _find(source, name)
    if not data or len(data) % _RECORD:
        raise ConfigError(
            f"{name} in {source} has {len(data):,} bytes, which is no whole number of CIFAR-10 records"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, _RECORD)


def _find(source: Path, name: str) -> bytes:
    try:
        if source.is_dir():
            return next(path for path in sorted(source.rglob(name))).read_bytes()
        with tarfile.open(source, "r:*") as archive:
            member = next(member for member in archive if member.isfile() and Path(member.name).name == name)
            file = archive.extractfile(member)
            return file.read() if file else b""
    except StopIteration:
        raise ConfigError(
            f"{source} holds no {name}; --format cifar10 reads the binary version, cifar-10-binary.tar.gz "
            "(the python version is made of pickles, which are not read)"
        ) from None
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{source} cannot be read as a folder or tar archive: {error}") from None
