"""Samples to WebDataset shards: deterministic bytes, and no half shard under a final name."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from webdataset.writer import TarWriter

from vitscale import storage
from vitscale.config import ConfigError
from vitscale.data.samples import RawSample

SAMPLES_PER_SHARD = 1000


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Callable[[RawSample], None]]:
    """Write samples to a shard that appears under `path`, whole and on disk, when the block ends without an
    exception.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            with TarWriter(file, user="", group="", mtime=0, encoder=False) as archive:
                yield lambda sample: _add_sample(archive, sample)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too, leaves no half shard; raised again
        temporary.unlink(missing_ok=True)
        raise
    storage.fsync_directory(path.parent)


def write_shards(
    samples: Iterable[RawSample],
    folder: Path,
    prefix: str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
) -> list[str]:
    """Write PREFIX-000000.tar, ... into `folder` and return their paths. The same samples give the same
    bytes.

    Raises ConfigError if such shards are there already, unless `overwrite`: then they are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(folder.glob(f"{prefix}-*.tar"))
    if existing and not overwrite:
        raise ConfigError(
            f"{folder} already holds {len(existing)} shards {prefix}-*.tar; choose another folder or "
            "--overwrite"
        )
    for leftover in [*existing, *folder.glob(f".{prefix}-*.tar.tmp-*")]:
        leftover.unlink()
    paths, waiting = [], iter(samples)
    for number in itertools.count():
        some = list(itertools.islice(waiting, samples_per_shard))
        if not some:
            return paths
        path = folder / shard_name(prefix, number)
        with open_shard(path) as write:
            for sample in some:
                write(sample)
        paths.append(str(path))
    raise AssertionError("unreachable")


def _add_sample(archive: TarWriter, sample: RawSample) -> None:
    labels = " ".join(map(str, sample.labels)).encode()
    archive.write({"__key__": sample.key, sample.extension: sample.image, "cls": labels})
    archive.tarstream.members = []  # pyright: ignore[reportAttributeAccessIssue] (or all headers are kept)
