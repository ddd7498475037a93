"""The index of a set of shards: what is where, and how to notice that it no longer is.

`index.json` names the shards with their bytes, samples and checksum; the array beside it holds the length
and
a 16-bit checksum of each chunk of K consecutive samples (4 bytes a chunk: 38 MB for 303 million samples at
K = 32, memory-mapped). Every read is compared with it: what disagrees is damage, never end of data.
"""

import collections
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vitscale import processes, storage
from vitscale.config import ConfigError
from vitscale.data.order import Layout
from vitscale.data.scan import LISTED, DataError, Scan, Shard, chunk_checksum, scan_shard
from vitscale.data.tar import BLOCK

FORMAT, VERSION = "vitscale-index", 2
MAX_CHUNK_SAMPLES = 65_535  # Layout.shortfalls counts in 16 bits
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Shards in order, and a record (blocks of 512 bytes, checksum) of every chunk [num_chunks]. Sample
    ids
    number the samples in order.
    """

    shards: tuple[Shard, ...]
    chunk_samples: int
    chunks: np.ndarray
    label_counts: dict[int, int]
    max_labels: int
    num_damaged: int = 0
    damage: tuple[str, ...] = ()

    @functools.cached_property
    def layout(self) -> Layout:
        counts = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        return Layout(counts, self.chunk_samples)

    @property
    def num_samples(self) -> int:
        return self.layout.num_samples

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def max_label(self) -> int:
        return max(self.label_counts)

    def fingerprint(self) -> str:
        """Names the content: equal for equal shards in the same order, wherever they lie."""
        digest = xxhash.xxh3_128(f"{self.chunk_samples}\n".encode())
        for shard in self.shards:
            digest.update(f"{shard.num_bytes} {shard.num_samples} {shard.checksum}\n".encode())
        return digest.hexdigest()

    def chunk_range(self, chunk: int) -> tuple[Shard, int, int]:
        """The shard that holds a chunk, and the chunk's first and last byte there: [start, end)."""
        number = self.layout.shard_of(chunk)
        first = int(self.layout.first_chunks[number])
        blocks = self.chunks["blocks"][first : chunk + 1].astype(np.int64)
        end = int(blocks.sum()) * BLOCK
        return self.shards[number], end - int(blocks[-1]) * BLOCK, end

    def is_intact(self, chunk: int, data: bytes) -> bool:
        """Whether these are the bytes of the chunk that were indexed."""
        return chunk_checksum(data) == int(self.chunks["checksum"][chunk])

    def _is_consistent(self) -> bool:
        """Whether the chunks are those of the shards: a shard that was taken out would move all others."""
        if not 1 <= self.chunk_samples <= MAX_CHUNK_SAMPLES or not self.label_counts:
            return False
        counts, firsts = self.layout.shard_samples, self.layout.first_chunks
        if counts.min() < 0 or len(self.chunks) != self.layout.num_chunks:
            return False
        blocks = np.add.reduceat(self.chunks["blocks"], firsts[:-1][counts > 0], dtype=np.int64)
        return [shard.data_bytes for shard in self.shards if shard.num_samples] == (blocks * BLOCK).tolist()

    def save(self, path: str | Path) -> None:
        """Write `path` and its array file beside it; shards in the same folder are named relative to it."""
        path = Path(path)
        buffer = io.BytesIO()
        np.save(buffer, self.chunks)
        array = buffer.getvalue()
        storage.write_atomic(path.with_suffix(".chunks.npy"), array)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": self.num_samples,
            "chunk_samples": self.chunk_samples,
            "max_labels": self.max_labels,
            "num_damaged": self.num_damaged,
            "damage": list(self.damage),
            "label_counts": {str(label): count for label, count in sorted(self.label_counts.items())},
            "chunks": {"file": path.with_suffix(".chunks.npy").name, "checksum": _checksum(array)},
        }
        lines = [json.dumps(_relative(shard, path), ensure_ascii=False) for shard in self.shards]
        shards = ",\n".join(lines)  # one a line: for people, and for grep
        text = f'{json.dumps(header, indent=1)[:-2]},\n "shards": [\n{shards}\n]}}\n'
        storage.write_atomic(path, text.encode())

    @classmethod
    def load(cls, path: str) -> "Index":
        """Read an index. Raises DataError if it is missing, damaged, or not an index."""
        remake = f"make it with: python tools/data.py index SHARDS --out {path}"
        try:
            values = json.loads(storage.read_bytes(path))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise DataError(f"{path} is a {values['format']} of version {values['version']}; {remake}")
            entry = values["chunks"]
            array = _open_array(storage.join(path, entry["file"]))
            if _checksum(array) != entry["checksum"]:
                raise DataError(f"{entry['file']} beside {path} does not match its checksum; {remake}")
            shards = (Shard(**shard) for shard in values["shards"])
            index = cls(
                shards=tuple(dataclasses.replace(s, url=storage.join(path, s.url)) for s in shards),
                chunk_samples=values["chunk_samples"],
                chunks=_parse_array(array),
                label_counts={int(label): count for label, count in values["label_counts"].items()},
                max_labels=values["max_labels"],
                num_damaged=values["num_damaged"],
                damage=tuple(values["damage"]),
            )
            if not index._is_consistent():
                raise DataError(f"the shards in {path} are not those of {entry['file']}; {remake}")
            return index
        except FileNotFoundError as error:
            raise DataError(f"index {path} is missing ({error.filename or error}); {remake}") from None
        except OSError as error:
            raise DataError(
                f"index {path} cannot be read: {error.strerror or error}; name an index.json"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            known = isinstance(error, DataError | ConfigError)
            raise (error if known else DataError(f"{path} is not an index; {remake}")) from None


def build_index(
    shards: Sequence[str],
    *,
    chunk_samples: int = 32,
    allow_damaged: bool = False,
    workers: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index shards in one pass over them, by `workers` processes (0 = in this one).

    journal: a file that keeps what is done, so that a killed build goes on where it stopped; it is removed
    at
    the end. progress: told each finished shard. A broken shard raises DataError unless `allow_damaged`
    (scan_shard); samples that cannot be used stay in the index, are counted, and replaced when read.
    """
    if not 1 <= chunk_samples <= MAX_CHUNK_SAMPLES:
        raise ConfigError(f"--chunk-samples {chunk_samples} must lie from 1 to {MAX_CHUNK_SAMPLES:,}")
    done = _Journal(journal, f"{chunk_samples} {allow_damaged}")
    known = {url for url in shards if done.holds(url)}
    scan = functools.partial(scan_shard, chunk_samples=chunk_samples, allow_damaged=allow_damaged)
    new = processes.map_in_order(scan, [url for url in shards if url not in known], workers)
    totals = _Totals()
    try:
        for url in shards:
            totals.add(done.read(url) if url in known else done.add(next(new)))
            if progress:
                progress(url)
    finally:
        new.close()  # type: ignore[attr-defined]
        done.close()
    index = totals.index(chunk_samples)
    done.remove()
    return index


def check_shards(index: Index) -> None:
    """Raise DataError if a shard is missing or has another size than when it was indexed."""
    sizes = storage.sizes([shard.url for shard in index.shards])
    for shard, size in zip(index.shards, sizes, strict=True):
        if size is None:
            raise DataError(
                f"shard {shard.url} is in the index but not there; restore it, or index the shards that "
                "are left: python tools/data.py index SHARDS"
            )
        if size != shard.num_bytes:
            raise DataError(
                f"shard {shard.url} has {size:,} bytes, the index says {shard.num_bytes:,}: it was cut or "
                "replaced after indexing; restore it, or index again: python tools/data.py index SHARDS"
            )


class _Journal:
    """The scans that an earlier, killed build has finished: one JSON line a shard, the last perhaps torn."""

    def __init__(self, path: Path | None, options: str) -> None:
        self._path, self._file = path, None
        self._places: dict[str, tuple[int, int]] = {}  # where the line of a shard begins, and its bytes
        if not path:
            return
        header = f"{FORMAT} {VERSION} {options}\n".encode()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close())
        self._file.seek(0)
        end = len(header) if self._file.readline() == header else 0
        for line in self._file if end else ():
            if line.endswith(b"\n"):
                shard = json.loads(line)["shard"]
                self._places[shard["url"]] = (end, shard["num_bytes"])
                end += len(line)
        self._file.truncate(end)
        if not end:
            self._file.write(header)

    def holds(self, url: str) -> bool:
        """Whether the shard is done, and still has the size that it had then."""
        return url in self._places and storage.sizes([url]) == [self._places[url][1]]

    def read(self, url: str) -> Scan:
        assert self._file
        self._file.seek(self._places[url][0])
        values = json.loads(self._file.readline())
        labels = {int(label): count for label, count in values["label_counts"].items()}
        chunks = [(blocks, checksum) for blocks, checksum in values["chunks"]]
        shard = Shard(**values["shard"])
        return Scan(**{**values, "shard": shard, "chunks": chunks, "label_counts": labels})

    def add(self, scan: Scan) -> Scan:
        if self._file:
            self._file.write(json.dumps(dataclasses.asdict(scan)).encode() + b"\n")
            self._file.flush()
        return scan

    def close(self) -> None:
        if self._file:
            self._file.close()

    def remove(self) -> None:
        if self._path:
            self._path.unlink()


class _Totals:
    """What the scans add up to, kept small: labels are added up, chunks packed, shard by shard."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.chunks: list[np.ndarray] = []
        self.labels: collections.Counter[int] = collections.Counter()
        self.damage: list[str] = []
        self.num_damaged = self.max_labels = 0

    def add(self, scan: Scan) -> None:
        self.shards.append(scan.shard)
        self.chunks.append(np.array(scan.chunks, dtype=np.uint32).reshape(-1, 2))
        self.labels.update(scan.label_counts)
        self.max_labels = max(self.max_labels, scan.max_labels)
        self.num_damaged += scan.num_damaged
        self.damage += scan.damage[: LISTED - len(self.damage)]

    def index(self, chunk_samples: int) -> Index:
        if not self.labels:
            first = self.shards[0].url if self.shards else "-"
            raise DataError(f"no usable sample in {len(self.shards)} shards, the first of them {first}")
        pairs = np.concatenate(self.chunks)
        # 2 bytes reach to chunks of 33 MB, which 32 samples of a megabyte each would fill.
        wide = int(pairs[:, 0].max()) > np.iinfo(np.uint16).max
        chunks = np.empty(len(pairs), dtype=[("blocks", "<u4" if wide else "<u2"), ("checksum", "<u2")])
        chunks["blocks"], chunks["checksum"] = pairs.T
        return Index(
            shards=tuple(self.shards),
            chunk_samples=chunk_samples,
            chunks=chunks,
            label_counts=dict(self.labels),
            max_labels=self.max_labels,
            num_damaged=self.num_damaged,
            damage=tuple(self.damage),
        )


def _relative(shard: Shard, path: Path) -> dict[str, Any]:
    values = dataclasses.asdict(shard)
    if storage.is_local(shard.url):
        local = Path(storage.local_path(shard.url)).absolute()
        values["url"] = local.name if local.parent == path.absolute().parent else str(local)
    return values


def _open_array(url: str) -> np.ndarray:
    """The bytes of the array file, uint8 [n]: mapped where it is local, so that processes share them."""
    if storage.is_local(url):
        return np.memmap(storage.local_path(url), dtype=np.uint8, mode="r")
    return np.frombuffer(storage.read_bytes(url), dtype=np.uint8)


def _parse_array(array: np.ndarray) -> np.ndarray:
    """The records in the bytes of a .npy file, without a copy."""
    stream = io.BytesIO(array[:4096].tobytes())
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return array[stream.tell() :].view(dtype).reshape(shape)


def _checksum(data: bytes | np.ndarray) -> str:
    return xxhash.xxh3_128(data if isinstance(data, bytes) else data.data).hexdigest()
