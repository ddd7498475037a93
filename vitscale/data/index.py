"""The index of a set of shards: what is where, and how to notice that it no longer is.

`index.json` names the shards with their bytes, samples and checksum; an array beside it holds the byte offset
of each chunk of K consecutive samples, in tar blocks of 512 bytes (4 bytes a chunk: 38 MB for 303 million
samples at K = 32). Reads that disagree with the index are damage, never end of data.
"""

import collections
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64, UInt32

from vitscale import storage
from vitscale.config import ConfigError
from vitscale.data.samples import BadSample, group
from vitscale.data.tar import BLOCK, Readable, TarDamage, walk

FORMAT, VERSION = "vitscale-index", 1
_LISTED = 20  # damaged samples that the index lists one by one; all are counted


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the shard and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file: `data_bytes` is where its last sample ends, `checksum` its xxh3-128 in hex."""

    url: str
    num_bytes: int
    data_bytes: int
    num_samples: int
    checksum: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Shards in order, and the block offset of every chunk, uint32 [num_chunks]. Sample ids number the
    samples in order.
    """

    shards: tuple[Shard, ...]
    chunk_samples: int
    chunk_blocks: UInt32[np.ndarray, " num_chunks"]
    label_counts: dict[int, int]
    max_labels: int
    num_damaged: int = 0
    damage: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts, shard_of = [], []
        for number, shard in enumerate(self.shards):
            full, rest = divmod(shard.num_samples, self.chunk_samples)
            counts += [self.chunk_samples] * full + [rest] * (rest > 0)
            shard_of += [number] * (full + (rest > 0))
        object.__setattr__(self, "chunk_counts", np.array(counts, dtype=np.int64))
        object.__setattr__(self, "chunk_shards", np.array(shard_of, dtype=np.int64))
        object.__setattr__(self, "chunk_first_ids", np.cumsum(self.chunk_counts) - self.chunk_counts)

    chunk_counts: Int64[np.ndarray, " num_chunks"] = dataclasses.field(init=False)
    chunk_shards: Int64[np.ndarray, " num_chunks"] = dataclasses.field(init=False)
    chunk_first_ids: Int64[np.ndarray, " num_chunks"] = dataclasses.field(init=False)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def max_label(self) -> int:
        return max(self.label_counts)

    def fingerprint(self) -> str:
        """Names the content: equal for equal shards in the same order, wherever they lie."""
        digest = hashlib.sha256(self.chunk_blocks.tobytes())
        for shard in self.shards:
            digest.update(f"{shard.num_bytes} {shard.num_samples} {shard.checksum}\n".encode())
        return digest.hexdigest()[:32]

    def chunk_range(self, chunk: int) -> tuple[Shard, int, int]:
        """The shard that holds a chunk, and the chunk's first and last byte there: [start, end)."""
        number = int(self.chunk_shards[chunk])
        shard = self.shards[number]
        last = chunk + 1 == len(self.chunk_blocks) or self.chunk_shards[chunk + 1] != number
        end = shard.data_bytes if last else int(self.chunk_blocks[chunk + 1]) * BLOCK
        return shard, int(self.chunk_blocks[chunk]) * BLOCK, end

    def chunk_of(self, sample_id: int) -> int:
        """The chunk that holds a sample."""
        return int(np.searchsorted(self.chunk_first_ids, sample_id, side="right")) - 1

    def save(self, path: str | Path) -> None:
        """Write `path` and its array file beside it; shards in the same folder are named relative to it."""
        path = Path(path)
        array_file = path.with_suffix(".chunks.npy")
        buffer = io.BytesIO()
        np.save(buffer, self.chunk_blocks)
        storage.write_atomic(array_file, buffer.getvalue())
        storage.write_atomic(path, json.dumps(self._to_json(path, buffer.getvalue()), indent=1).encode())

    def _to_json(self, path: Path, array: bytes) -> dict[str, Any]:
        folder = str(path.resolve().parent)
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        for shard in shards:
            if storage.is_local(shard["url"]):
                local = Path(storage.local_path(shard["url"])).resolve()
                shard["url"] = local.name if str(local.parent) == folder else str(local)
        return {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": self.num_samples,
            "chunk_samples": self.chunk_samples,
            "max_labels": self.max_labels,
            "num_damaged": self.num_damaged,
            "damage": list(self.damage),
            "label_counts": {str(label): count for label, count in sorted(self.label_counts.items())},
            "arrays": {
                "chunk_blocks": {"file": path.with_suffix(".chunks.npy").name, "checksum": _checksum(array)}
            },
            "shards": shards,
        }

    @classmethod
    def load(cls, path: str) -> "Index":
        """Read an index. Raises DataError if it is missing, damaged, or not an index."""
        remake = f"make it with: python tools/data.py index SHARDS --out {path}"
        try:
            values = json.loads(storage.read_bytes(path))
            if values["format"] != FORMAT or values["version"] != VERSION:
                raise DataError(f"{path} is a {values['format']} of version {values['version']}; {remake}")
            entry = values["arrays"]["chunk_blocks"]
            array = storage.read_bytes(storage.join(path, entry["file"]))
        except FileNotFoundError as error:
            raise DataError(f"index {path} is missing ({error.filename or error}); {remake}") from None
        except OSError as error:
            raise DataError(
                f"index {path} cannot be read: {error.strerror or error}; name an index.json"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise (
                error
                if isinstance(error, DataError | ConfigError)
                else DataError(f"{path} is not an index; {remake}")
            ) from None
        if _checksum(array) != entry["checksum"]:
            raise DataError(f"{entry['file']} beside {path} does not match its checksum; {remake}")
        return cls(
            shards=tuple(
                Shard(**{**shard, "url": storage.join(path, shard["url"])}) for shard in values["shards"]
            ),
            chunk_samples=values["chunk_samples"],
            chunk_blocks=np.load(io.BytesIO(array), allow_pickle=False),
            label_counts={int(label): count for label, count in values["label_counts"].items()},
            max_labels=values["max_labels"],
            num_damaged=values["num_damaged"],
            damage=tuple(values["damage"]),
        )


def build_index(
    shards: Sequence[str],
    *,
    chunk_samples: int = 32,
    allow_damaged: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Index:
    """Index shards in one pass over them. `progress` is told each finished shard.

    A cut, broken, empty or missing shard raises DataError, unless `allow_damaged`: then its whole samples
    before the damage are indexed. Samples that cannot be used (no label, not an image) stay in the index, are
    counted, and replaced when read.
    """
    scans = []
    for url in shards:
        scans.append(_scan_shard(url, chunk_samples, allow_damaged))
        if progress:
            progress(url)
    labels: collections.Counter[int] = collections.Counter()
    for scan in scans:
        labels.update(scan.label_counts)
    if not labels:
        raise DataError(
            f"no usable sample in {len(shards)} shards, the first of them {shards[0] if shards else '-'}"
        )
    damage = [sentence for scan in scans for sentence in scan.damage]
    return Index(
        shards=tuple(scan.shard for scan in scans),
        chunk_samples=chunk_samples,
        chunk_blocks=np.array([block for scan in scans for block in scan.chunk_blocks], dtype=np.uint32),
        label_counts=dict(labels),
        max_labels=max(scan.max_labels for scan in scans),
        num_damaged=len(damage),
        damage=tuple(damage[:_LISTED]),
    )


def verify_index(index: Index, progress: Callable[[str], None] | None = None) -> list[str]:
    """Read every shard again and compare it with the index: one sentence for each damaged place."""
    damage: list[str] = []
    for shard in index.shards:
        try:
            scan = _scan_shard(shard.url, index.chunk_samples, allow_damaged=True)
            damage += scan.damage
            if scan.shard != shard and not scan.tar_damage:
                damage.append(
                    f"{shard.url}: is not the shard that was indexed: {_difference(shard, scan.shard)}"
                )
        except DataError as error:
            damage.append(str(error))
        if progress:
            progress(shard.url)
    return damage


def check_shards(index: Index) -> None:
    """Raise DataError if a local shard is missing or has another size than when it was indexed."""
    for shard in index.shards:
        if not storage.is_local(shard.url):
            continue
        try:
            size = storage.size(shard.url)
        except FileNotFoundError:
            raise DataError(
                f"shard {shard.url} is in the index but not on disk; restore it, or index the shards that "
                "are left: python tools/data.py index SHARDS"
            ) from None
        if size != shard.num_bytes:
            raise DataError(
                f"shard {shard.url} has {size:,} bytes, the index says {shard.num_bytes:,}: it was cut or "
                "replaced after indexing; restore it, or index again: python tools/data.py index SHARDS"
            )


@dataclasses.dataclass(kw_only=True)
class _Scan:
    shard: Shard
    chunk_blocks: list[int]
    label_counts: collections.Counter[int]
    max_labels: int
    damage: list[str]
    tar_damage: bool


class _HashingStream:
    """Counts and hashes what is read through it."""

    def __init__(self, stream: Readable) -> None:
        self.stream, self.hash, self.count = stream, xxhash.xxh3_128(), 0

    def read(self, size: int = -1, /) -> bytes:
        data = self.stream.read(size)
        self.hash.update(data)
        self.count += len(data)
        return data


def _scan_shard(url: str, chunk_samples: int, allow_damaged: bool) -> _Scan:
    blocks, labels, damage, keys = [], collections.Counter[int](), list[str](), set[str]()
    count = max_labels = data_bytes = 0
    tar_damage = False
    try:
        with storage.open_stream(url) as raw:
            stream = _HashingStream(raw)
            try:
                for sample, start in group(walk(stream, whole=True)):
                    if count % chunk_samples == 0:
                        blocks.append(start // BLOCK)
                    count += 1
                    if sample.key in keys:
                        damage.append(f"{url}: sample {sample.key}: its key stands twice in this shard")
                    keys.add(sample.key)
                    if isinstance(sample, BadSample):
                        damage.append(f"{url}: sample {sample.key}: {sample.reason}")
                    else:
                        labels.update(sample.labels)
                        max_labels = max(max_labels, len(sample.labels))
                data_bytes = stream.count - BLOCK
                while rest := stream.read(1 << 20):
                    if any(rest):
                        raise TarDamage(data_bytes, "an empty block, and data after it")
            except TarDamage as error:
                tar_damage, data_bytes = True, error.whole_until
                damage.append(f"{url}: {error}; {count:,} whole samples before it")
            while stream.read(1 << 20):
                pass
    except FileNotFoundError:
        raise DataError(f"shard {url} does not exist") from None
    except OSError as error:
        raise DataError(f"shard {url} cannot be read: {error.strerror or error}") from None
    if tar_damage and not allow_damaged:
        raise DataError(f"{damage[-1]}; restore the shard, leave it out, or keep those with --allow-damaged")
    if count == 0 and not (allow_damaged and tar_damage):
        raise DataError(f"shard {url} is empty: it holds no sample; leave it out")
    shard = Shard(
        url=url,
        num_bytes=stream.count,
        data_bytes=data_bytes,
        num_samples=count,
        checksum=stream.hash.hexdigest(),
    )
    return _Scan(
        shard=shard,
        chunk_blocks=blocks,
        label_counts=labels,
        max_labels=max_labels,
        damage=damage,
        tar_damage=tar_damage,
    )


def _difference(indexed: Shard, found: Shard) -> str:
    if indexed.num_bytes != found.num_bytes:
        return f"{found.num_bytes:,} bytes instead of {indexed.num_bytes:,}"
    if indexed.num_samples != found.num_samples:
        return f"{found.num_samples:,} samples instead of {indexed.num_samples:,}"
    return "its checksum differs"


def _checksum(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
