"""Samples to WebDataset shards: deterministic bytes, and no half shard under a final name."""

import os
from collections.abc import Iterable
from pathlib import Path

from webdataset.writer import ShardWriter

from vitscale.config import ConfigError
from vitscale.data.samples import RawSample

SAMPLES_PER_SHARD = 1000


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
    for leftover in [*existing, *folder.glob(f".{prefix}-*.tar.tmp")]:
        leftover.unlink()
    pattern = str(folder / f".{prefix}-%06d.tar.tmp")
    with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=1 << 40, mtime=0, verbose=0) as writer:
        for sample in samples:
            labels = " ".join(map(str, sample.labels))
            writer.write({"__key__": sample.key, sample.extension: sample.image, "cls": labels.encode()})
    paths = []
    for temporary in sorted(folder.glob(f".{prefix}-*.tar.tmp")):
        final = temporary.with_name(temporary.name[1:].removesuffix(".tmp"))
        os.replace(temporary, final)
        paths.append(str(final))
    return paths
