"""What the tests of packing share: class folders to pack, and what the shards hold."""

from pathlib import Path

from make import jpeg

from vitscale.curate.pack.config import PackConfig, PackReport
from vitscale.curate.pack.run import pack
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample


def write_photos(folder: Path, count: int = 25, size: int = 16) -> str:
    """Image i is jpeg(i, size) with the label i % 2, in the class folder ant or cat."""
    for number in range(count):
        path = folder / ["ant", "cat"][number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, size))
    return str(folder)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The shards in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def read_all(shards: list[str]) -> list[RawSample]:
    index = build_index(shards)
    return list(read_samples(index, range(index.num_samples)))


def samples_of(report: PackReport, split: str = "train") -> list[RawSample]:
    """What the shards of a split hold, in order."""
    return read_all(report.shards[split])


def packed(source: Path | str, out: Path, **options) -> PackReport:
    """The report of a packing that keeps the order of its source."""
    return pack(str(source), out, PackConfig(shuffle=False, **options))
