"""The index of a set of shards: what is where, and how to notice that it no longer is.

`index.json` names the shards with their bytes, samples and checksum. The array beside it holds,
for each chunk of K consecutive samples, its length and a 16-bit checksum: 4 bytes a chunk, so
38 MB for 303 million samples at K = 32, memory-mapped. Every read is compared with the index:
what disagrees is damage, never the end of the data. A second array holds 16 bits of the hash of
every sample's key, and is read only where a validation split is cut (split.py). The arrays are
named after their checksums: replacing index.json alone replaces the index. It has a checksum of
itself, without the URLs of the shards, which may move.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool

from vitscale.config import check_utf8
from vitscale.data.classes import names_beside
from vitscale.data.neighbours import Neighbours, compare
from vitscale.data.order import ShardLayout
from vitscale.data.samples import DEFAULT_KEYS, SampleKeys
from vitscale.data.scan import Shard, chunk_checksum, is_lone
from vitscale.data.stored import StoredArray, remove_arrays, write_array
from vitscale.data.tar import BLOCK
from vitscale.errors import DataError, StoreError, UserError
from vitscale.stores import storage
from vitscale.system import atomic

FORMAT, VERSION = "vitscale-index", 3
READABLE = (2, 3)  # version 2 means its samples strictly (SampleKeys.strict)
CHUNK_SAMPLES = 32  # unless --chunk-samples says otherwise
MAX_LONE = 3  # of a small set; of a large one 5% of its labels
MAX_CHUNK_SAMPLES = 65_535  # ShardLayout.shortfalls counts in 16 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Shards in order, with what is known of their chunks; sample ids count through them.

    chunks: an array of records (blocks: the chunk's length in blocks of 512 bytes; checksum; if
    there is any damage, damaged: whether a sample of the chunk cannot be used).
    keys: which files are the samples' images and labels. lone_samples: where the lone_labels
    are. key_hashes: of all samples. The rest is as in Findings. In indexes of earlier commits
    what they did not count is empty, None or 0, and repeated keys count as damage.
    """

    shards: tuple[Shard, ...]
    chunk_samples: int
    chunks: np.ndarray  # [num_chunks]
    label_counts: dict[int, int]
    max_labels: int
    num_damaged: int = 0
    damage: tuple[str, ...] = ()
    reasons: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    repeated_keys: tuple[int, str] = (0, "")
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keys: SampleKeys = DEFAULT_KEYS
    lone_samples: Mapping[int, list[str]] = dataclasses.field(default_factory=dict)
    key_hashes: StoredArray | None = None
    hash_ranges: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    num_neighbours: int = 0
    shared_labels: int = 0

    @functools.cached_property
    def layout(self) -> ShardLayout:
        counts = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        return ShardLayout(counts, self.chunk_samples)

    @property
    def num_samples(self) -> int:
        return self.layout.num_samples

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def max_label(self) -> int:
        return max(self.label_counts)

    @functools.cached_property
    def lone_labels(self) -> tuple[int, ...]:
        """Labels that are probably mistakes: of very few samples, and far above the others.

        Many such labels are no mistakes, but a small part of a set of many classes.
        """
        num_labels = len(self.label_counts)
        lone = [label for label, count in self.label_counts.items() if is_lone(label, count, num_labels)]
        most = min(num_labels - 1, max(MAX_LONE, num_labels // 20))
        return tuple(sorted(lone)) if len(lone) <= most else ()

    @property
    def usual_labels(self) -> set[int]:
        """All labels but the lone ones."""
        return self.label_counts.keys() - set(self.lone_labels)

    @functools.cached_property
    def classes(self) -> Mapping[str, int]:
        """The labels of the class names; {} if the names are not known."""
        return self.keys.classes or names_beside(self.shards[0].url)

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {label: name for name, label in reversed(list(self.classes.items()))}  # the first name counts

    def named(self, label: int) -> str:
        """A label for messages, like "17 (dog)"; "17" where its class has no known name."""
        return f"{label} ({self._names[label]})" if label in self._names else str(label)

    @functools.cached_property
    def neighbours(self) -> Neighbours:
        """Whether the shards are sorted by class."""
        num_usable = self.num_samples - self.num_damaged
        return compare(
            self.num_neighbours, self.shared_labels, self.label_counts, num_usable, self.max_labels
        )

    def describe_lone(self) -> list[str]:
        """A sentence for each lone label, with its samples."""
        return [
            f"label {self.named(label)} stands alone among {len(self.label_counts):,} labels: "
            + (", ".join(self.lone_samples.get(label, ())) or f"{self.label_counts[label]} samples")
            for label in self.lone_labels
        ]

    def fingerprint(self) -> str:
        """Names the content: equal for equal shards in the same order, wherever they are.

        It depends on the keys only where they matter: version 2 and the default keys have equal
        samples if there are no files to be passed over but KEY.txt.
        """
        digest = xxhash.xxh3_128(f"{self.chunk_samples}\n".encode())
        for shard in self.shards:
            digest.update(f"{shard.num_bytes} {shard.num_samples} {shard.checksum}\n".encode())
        is_as_ever = self.keys.strict or (self.keys == DEFAULT_KEYS and self.passed_over.keys() <= {".txt"})
        if not is_as_ever:
            digest.update(json.dumps(dataclasses.asdict(self.keys), sort_keys=True).encode())
        return digest.hexdigest()

    def chunk_range(self, chunk: int) -> tuple[Shard, int, int]:
        """The shard that holds a chunk, and the chunk's bytes [start, end) in it."""
        shard = self.layout.shard_of(chunk)
        first = int(self.layout.first_chunks[shard])
        # Lengths are stored, not offsets: those of the shard's chunks up to this one add up.
        blocks = self.chunks["blocks"][first : chunk + 1].astype(np.int64)
        end = int(blocks.sum()) * BLOCK
        return self.shards[shard], end - int(blocks[-1]) * BLOCK, end

    def is_intact(self, chunk: int, data: bytes) -> bool:
        """Whether `data` are the bytes of the chunk as they were indexed."""
        return chunk_checksum(data) == int(self.chunks["checksum"][chunk])

    def _is_consistent(self) -> bool:
        """Whether the chunks are those of the shards: one taken out would shift all others.

        They lie in the shards, whose sizes are compared before a run: no read is of more.
        """
        if not 1 <= self.chunk_samples <= MAX_CHUNK_SAMPLES or not self.label_counts:
            return False
        counts, first_chunks = self.layout.shard_samples, self.layout.first_chunks
        if counts.min() < 0 or len(self.chunks) != self.layout.num_chunks:
            return False
        if self.chunks.dtype["blocks"] not in (np.uint16, np.uint32):  # others: negative, or overflow
            return False
        if any(shard.data_bytes > shard.num_bytes for shard in self.shards):
            return False
        filled_firsts = first_chunks[:-1][counts > 0]  # without the empty shards
        blocks = np.add.reduceat(self.chunks["blocks"], filled_firsts, dtype=np.int64)
        return [shard.data_bytes for shard in self.shards if shard.num_samples] == (blocks * BLOCK).tolist()

    def save(self, path: str | Path) -> None:
        """Write `path` and the array files beside it. Shards in its folder get relative URLs.

        The arrays of the index that it replaces stay for whoever is reading them; those of
        indexes before that are removed.
        """
        path = Path(path)
        replaced = _named_arrays(path)
        chunks = write_array(path, "chunks", self.chunks)
        hashes = self.key_hashes and write_array(path, "keys", self.key_hashes.read())
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": self.num_samples,
            "chunk_samples": self.chunk_samples,
            "max_labels": self.max_labels,
            "num_damaged": self.num_damaged,
            "damage": list(self.damage),
            "reasons": self.reasons,
            "repeated_keys": self.repeated_keys,
            "passed_over": self.passed_over,
            "keys": dataclasses.asdict(self.keys),
            "lone_samples": {str(label): samples for label, samples in self.lone_samples.items()},
            "num_neighbours": self.num_neighbours,
            "shared_labels": self.shared_labels,
            "label_counts": {str(label): count for label, count in sorted(self.label_counts.items())},
            "hash_ranges": {str(label): ends for label, ends in sorted(self.hash_ranges.items())},
            "chunks": chunks,
            "key_hashes": hashes,
        }
        shards = [dataclasses.asdict(shard) | {"url": _relative(shard.url, path)} for shard in self.shards]
        header["checksum"] = _checksum(header | {"shards": shards})
        # one a line, for people and for grep
        listed = ",\n".join(json.dumps(shard, ensure_ascii=False) for shard in shards)
        text = f'{json.dumps(header, indent=1)[:-2]},\n "shards": [\n{listed}\n]}}\n'
        atomic.write(path, text.encode())
        remove_arrays(path, keep=replaced | {entry["file"] for entry in (chunks, hashes) if entry})

    @classmethod
    def load(cls, path: str) -> "Index":
        """Read an index.

        Raises DataError if it is missing, damaged or no index, StoreError if it cannot be read.
        """
        remake = f"make it with: python tools/data.py index SHARDS --out {path}"
        try:
            return cls._read(path, remake)
        except UserError:
            raise
        except FileNotFoundError:
            raise DataError(
                f"index {path} is missing; pack images with: python tools/data.py pack SOURCE FOLDER, or "
                f"index shards with: python tools/data.py index SHARDS --out {path}"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"index {path} cannot be read: {reason}; name an index.json") from None
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise DataError(
                f"{path} is not an index of vitscale, though other tools write an index.json, too; of "
                "WebDataset tars, make one with: python tools/data.py index SHARDS; docs/data.md says how to "
                "convert shards of MosaicML's streaming (MDS) and of litData"
            ) from None

    @classmethod
    def _read(cls, path: str, remake: str) -> "Index":
        values = json.loads(storage.read_bytes(path))
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        if values["version"] not in READABLE:
            raise DataError(f"{path} is an index of version {values['version']}; {remake}")
        if "checksum" in values and values["checksum"] != _checksum(values):  # earlier commits wrote none
            raise DataError(f"{path} is damaged: its checksum does not match; {remake}")
        chunks = _stored(path, values["chunks"], remake)
        shards = (Shard(**shard) for shard in values["shards"])
        index = cls(
            shards=tuple(dataclasses.replace(s, url=storage.join(path, s.url)) for s in shards),
            chunk_samples=values["chunk_samples"],
            chunks=chunks.read(),
            label_counts={int(label): count for label, count in values["label_counts"].items()},
            max_labels=values["max_labels"],
            num_damaged=values["num_damaged"],
            damage=tuple(values["damage"]),
            **_read_newer(path, values, remake),
        )
        _check_types(index)
        if not index._is_consistent():
            raise DataError(f"the shards in {path} are not those of {values['chunks']['file']}; {remake}")
        return index


def check_replaceable(path: Path) -> None:
    """Raise DataError for a file with content that is no index: it would be lost."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(100)
    if head and f'"{FORMAT}"'.encode() not in head:
        raise DataError(f"{path} is there and is not an index; name another file with --out")


def check_names(urls: Iterable[str], path: Path) -> None:
    """Raise ConfigError for a shard whose name an index at `path` cannot hold."""
    for url in urls:
        check_utf8("the shard", _relative(url, path))


def planned_index(num_samples: int) -> Index:
    """What is known of an index before it is made: its number of samples. It cannot be read."""
    shard = Shard(url="", num_bytes=0, data_bytes=0, num_samples=num_samples, checksum="")
    return Index(
        shards=(shard,), chunk_samples=CHUNK_SAMPLES, chunks=np.empty(0), label_counts={}, max_labels=1
    )


def damaged_chunks(chunks: np.ndarray) -> Bool[np.ndarray, " num_chunks"]:
    """Which chunks of an index held damage when it was made; all False if it does not say."""
    names = chunks.dtype.names or ()
    return chunks["damaged"] if "damaged" in names else np.zeros(len(chunks), dtype=bool)


def check_shards(index: Index) -> None:
    """Raise DataError if a shard is missing or has another size than when it was indexed."""
    sizes = storage.sizes([shard.url for shard in index.shards])
    for shard, size in zip(index.shards, sizes, strict=True):
        if size is None:
            raise DataError(
                f"shard {shard.url} is in the index but not there; restore it, or index the shards that are "
                "left: python tools/data.py index SHARDS"
            )
        if size != shard.num_bytes:
            raise DataError(
                f"shard {shard.url} has {size:,} bytes, the index says {shard.num_bytes:,}: it was cut or "
                "replaced after indexing; restore it, or index again: python tools/data.py index SHARDS"
            )


def _read_newer(path: str, values: dict[str, Any], remake: str) -> dict[str, Any]:
    """The fields that version 2 does not have, or what their absence means."""
    if values["version"] == 2:
        return {"keys": SampleKeys(strict=True)}
    reasons = {reason: (count, example) for reason, (count, example) in values["reasons"].items()}
    num_repeated, first_repeated = values.get("repeated_keys", (0, ""))
    ranges = values.get("hash_ranges", {}).items()
    return {
        "reasons": reasons,
        "repeated_keys": (num_repeated, first_repeated),
        "passed_over": values["passed_over"],
        "keys": SampleKeys(**values["keys"]),
        "lone_samples": {int(label): samples for label, samples in values.get("lone_samples", {}).items()},
        "key_hashes": _stored(path, values["key_hashes"], remake) if values.get("key_hashes") else None,
        "hash_ranges": {int(label): (lowest, highest) for label, (lowest, highest) in ranges},
        "num_neighbours": values.get("num_neighbours", 0),
        "shared_labels": values.get("shared_labels", 0),
    }


def _check_types(index: Index) -> None:
    """Raise TypeError or AttributeError for what JSON can hold and an index cannot."""
    numbers = [index.chunk_samples, index.max_labels, index.num_damaged, index.repeated_keys[0]]
    numbers += [index.num_neighbours, index.shared_labels, *index.label_counts.values()]
    numbers += [*index.passed_over.values(), *index.keys.classes.values()]
    numbers += [count for count, _ in index.reasons.values()]
    numbers += [end for ends in index.hash_ranges.values() for end in ends]
    texts = [index.repeated_keys[1], *index.damage, *(shard.checksum for shard in index.shards)]
    texts += [example for _, example in index.reasons.values()]
    texts += [sample for samples in index.lone_samples.values() for sample in samples]
    if {type(value) for value in numbers} != {int} or {type(value) for value in texts} != {str}:
        raise TypeError("a value of another type")


def _checksum(values: dict[str, Any]) -> str:
    """The checksum of an index.json: of all values but itself and the URLs of the shards."""
    shards = [shard | {"url": ""} for shard in values["shards"]]
    content = {name: value for name, value in values.items() if name != "checksum"} | {"shards": shards}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stored(path: str, entry: dict[str, str], remake: str) -> StoredArray:
    """An array that the index at `path` names, in a file beside it."""
    return StoredArray(
        url=storage.join(path, entry["file"]), checksum=entry["checksum"], remake=f"beside {path}; {remake}"
    )


def _named_arrays(path: Path) -> set[str]:
    """The names of the array files of a local index; none if there is no index."""
    try:
        values = json.loads(path.read_bytes())
        return {values[kind]["file"] for kind in ("chunks", "key_hashes") if values.get(kind)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


def _relative(url: str, path: Path) -> str:
    """The URL of a shard as the index at `path` has it."""
    if not storage.is_local(url):
        return url
    local = Path(storage.local_path(url)).absolute()
    return local.name if local.parent == path.absolute().parent else str(local)
