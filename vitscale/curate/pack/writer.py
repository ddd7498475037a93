"""Writes samples to WebDataset shards: deterministic bytes, and only whole shards appear."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from webdataset.writer import TarWriter

from vitscale.data.samples import RawSample
from vitscale.system import atomic

SAMPLES_PER_SHARD = 1000
NO_LABELS = b'{"labels": []}'  # in KEY.json: the image has no label, which an empty KEY.cls cannot say


def shard_name(split: str, shard_number: int) -> str:
    return f"{split}-{shard_number:06d}.tar"


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Callable[[RawSample], None]]:
    """Open a shard and yield a function that writes one sample to it.

    It appears as `path`, complete and on disk, when the block ends without an exception.
    """
    with (
        atomic.appearing(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, user="", group="", mtime=0, encoder=False) as archive,
    ):
        yield lambda sample: _add_sample(archive, sample)


def write_shards(
    samples: Iterable[RawSample],
    folder: Path,
    prefix: str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> list[str]:
    """Write PREFIX-000000.tar, ... to `folder` and return their paths.

    The same samples give the same bytes. Shards of that prefix that are there are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(f"{prefix}-*.tar"), *folder.glob(f".{prefix}-*.tar.tmp-*")]:
        leftover.unlink()
    paths, remaining = [], iter(samples)
    while shard_samples := list(itertools.islice(remaining, samples_per_shard)):
        path = folder / shard_name(prefix, len(paths))
        with open_shard(path) as write:
            for sample in shard_samples:
                write(sample)
        paths.append(str(path))
    return paths


def _add_sample(archive: TarWriter, sample: RawSample) -> None:
    labels = {"cls": " ".join(map(str, sample.labels)).encode()} if sample.labels else {"json": NO_LABELS}
    archive.write({"__key__": sample.key, sample.extension: sample.image, **labels})
    archive.tarstream.members = []  # pyright: ignore[reportAttributeAccessIssue] (else it keeps all)
