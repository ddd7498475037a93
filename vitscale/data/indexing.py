"""Makes an index, in one pass over the shards; a build that was killed resumes."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from vitscale.data.index import CHUNK_SAMPLES, FORMAT, MAX_CHUNK_SAMPLES, VERSION, Index
from vitscale.data.samples import DEFAULT_KEYS, SampleKeys
from vitscale.data.scan import LONE_SAMPLES, Findings, Scan, Shard, commonest, scan_shard
from vitscale.data.stored import StoredArray
from vitscale.errors import ConfigError, DataError
from vitscale.stores import storage
from vitscale.system import file_lock, processes


def build_index(
    shards: Sequence[str],
    *,
    chunk_samples: int = CHUNK_SAMPLES,
    allow_damaged: bool = False,
    keys: SampleKeys = DEFAULT_KEYS,
    workers: int = 0,
    journal: Path | None = None,
    progress: processes.ProgressCallback = processes.no_progress,
) -> Index:
    """Index shards in one pass over them, by `workers` processes (0 = in this one).

    journal: a file that records each finished shard, so that a killed build resumes; see
    journal_of. progress: called with numbers of shards. A broken shard raises DataError unless
    `allow_damaged` (see scan_shard). Samples that cannot be used are counted and stay in the
    index; they are replaced when they are read.
    """
    if not 1 <= chunk_samples <= MAX_CHUNK_SAMPLES:
        raise ConfigError(f"--chunk-samples {chunk_samples} must be from 1 to {MAX_CHUNK_SAMPLES:,}")
    if len(set(map(storage.without_query, shards))) < len(set(shards)):
        raise ConfigError(
            "some shards differ only in the queries of their URLs, which an index does not keep: give each "
            "shard a path of its own"
        )
    finished = _Journal(journal, f"{chunk_samples} {allow_damaged} {json.dumps(dataclasses.asdict(keys))}")
    known = finished.held(shards)
    scan = functools.partial(scan_shard, chunk_samples=chunk_samples, allow_damaged=allow_damaged, keys=keys)
    scans = processes.map_in_order(scan, [url for url in shards if url not in known], workers)
    builder = _IndexBuilder()
    try:
        progress(0, len(shards))
        for num_done, url in enumerate(shards, 1):
            builder.add(finished.read(url) if url in known else finished.add(next(scans)))
            progress(num_done, len(shards))
    finally:
        scans.close()  # type: ignore[attr-defined]
        finished.close()
    return builder.index(chunk_samples, keys)


def open_index(pattern: str) -> Index:
    """An index.json, or plain shards by glob, brace pattern or URL, to be indexed in memory.

    Such an index keeps the queries of URLs, which may be signatures: it is not for saving.
    Raises DataError or ConfigError for what is missing or damaged, StoreError for what cannot
    be read.
    """
    if storage.without_query(pattern).endswith(".json"):
        return Index.load(pattern)
    urls = storage.expand(pattern)
    index = build_index(urls)
    shards = (dataclasses.replace(shard, url=url) for shard, url in zip(index.shards, urls, strict=True))
    return dataclasses.replace(index, shards=tuple(shards))


@contextlib.contextmanager
def journal_of(out: Path) -> Iterator[Path]:
    """The journal for building and saving the index `out` within the block, then removed.

    An exception in the block keeps it for the next build. Raises BusyError if another process
    is in such a block for the same index.
    """
    path = out.with_suffix(".partial")
    with contextlib.ExitStack() as opened:
        while True:
            file = opened.enter_context(open(path, "ab"))
            file_lock.hold(file.fileno(), f"another command is making {out}; wait for it, or stop it")
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else its holder has removed it meanwhile
        finished = False
        try:
            yield path
            finished = True
        finally:
            if finished or not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


class _Journal:
    """The scans that a build has finished, for the next build if it is killed.

    A file with one line a shard: the digest of its JSON, and the JSON. A kill may tear the last
    line, and a power cut may empty others: from the first whose digest differs on, shards are
    read again.
    """

    def __init__(self, path: Path | None, options: str) -> None:
        self._path, self._file = path, None
        self._lines: dict[str, tuple[int, str]] = {}  # by shard: its line's offset, its version
        if not path:
            return
        fields = " ".join(field.name for kept in (Scan, Findings) for field in dataclasses.fields(kept))
        header = f"{FORMAT} {VERSION} digest {fields} {options}\n".encode()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close())
        self._file.seek(0)
        end = len(header) if self._file.readline() == header else 0
        for line in self._file if end else ():
            text = line.partition(b" ")[2]
            if line != _digested(text):
                break
            values = json.loads(text)
            self._lines[values["shard"]["url"]] = (end, values["version"])
            end += len(line)
        self._file.truncate(end)
        if not end:
            self._file.write(header)

    def held(self, urls: Sequence[str]) -> set[str]:
        """Those shards that are finished and have not changed since."""
        finished = [url for url in urls if storage.without_query(url) in self._lines]
        versions = zip(finished, storage.versions(finished), strict=True)
        return {url for url, version in versions if version == self._lines[storage.without_query(url)][1]}

    def read(self, url: str) -> Scan:
        assert self._file
        self._file.seek(self._lines[storage.without_query(url)][0])
        values = json.loads(self._file.readline().partition(b" ")[2])
        found = values["found"]
        counts = {int(label): count for label, count in found["label_counts"].items()}
        ranges = {int(label): (low, high) for label, (low, high) in found["hash_ranges"].items()}
        pairs = {
            "label_counts": counts,
            "hash_ranges": ranges,
            "repeated_keys": tuple(found["repeated_keys"]),
        }
        chunks = [(blocks, checksum) for blocks, checksum in values["chunks"]]
        shard = Shard(**values["shard"])
        return Scan(**{**values, "shard": shard, "chunks": chunks, "found": Findings(**{**found, **pairs})})

    def add(self, scan: Scan) -> Scan:
        if self._file:
            self._file.write(_digested(json.dumps(dataclasses.asdict(scan)).encode() + b"\n"))
            self._file.flush()
        return scan

    def close(self) -> None:
        if self._file:
            self._file.close()


def _digested(text: bytes) -> bytes:
    """A line of a journal. text: its JSON, with the end of the line."""
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text


class _IndexBuilder:
    """Adds scans up to an index, in little memory: labels are summed, chunks packed at once."""

    def __init__(self) -> None:
        self.found = Findings()
        self.shards: list[Shard] = []
        self.chunks: list[np.ndarray] = []
        self.damaged: list[np.ndarray] = []  # by shard: whether each chunk holds damage
        self.rare: dict[int, list[str]] = {}
        self.key_hashes: list[np.ndarray] = []

    def add(self, scan: Scan) -> None:
        self.found.add(scan.found)
        self.shards.append(scan.shard)
        self.chunks.append(np.array(scan.chunks, dtype=np.uint32).reshape(-1, 2))
        self.damaged.append(np.isin(np.arange(len(scan.chunks)), scan.damaged_chunks))
        for label, samples in scan.rare.items():
            if self.found.label_counts[int(label)] < LONE_SAMPLES:
                self.rare.setdefault(int(label), []).extend(samples)
            else:
                self.rare.pop(int(label), None)
        self.key_hashes.append(np.array(scan.key_hashes, dtype="<u2"))

    def index(self, chunk_samples: int, keys: SampleKeys) -> Index:
        if not self.found.label_counts:
            why = "; ".join(commonest(self.found.reasons)) or "none has a label"
            raise DataError(
                f"no usable sample in {len(self.shards):,} shards: {why}. Say what holds images and labels: "
                "python tools/data.py index SHARDS --image-key EXTENSION --label-key EXTENSION_OR_FIELD, "
                "and --classes FILE for labels that are names"
            )
        pairs = np.concatenate(self.chunks)
        # 2 bytes suffice for chunks of up to 33 MB: 32 samples of a megabyte each.
        wide = int(pairs[:, 0].max()) > np.iinfo(np.uint16).max
        damaged = np.concatenate(self.damaged)
        fields = [("blocks", "<u4" if wide else "<u2"), ("checksum", "<u2")]
        chunks = np.empty(len(pairs), dtype=[*fields, ("damaged", "?")] if damaged.any() else fields)
        chunks["blocks"], chunks["checksum"] = pairs.T
        if damaged.any():
            chunks["damaged"] = damaged
        index = Index(
            shards=tuple(self.shards),
            chunk_samples=chunk_samples,
            chunks=chunks,
            keys=keys,
            key_hashes=StoredArray(np.concatenate(self.key_hashes)),
            **{**vars(self.found), "damage": tuple(self.found.damage)},
        )
        lone_samples = {label: self.rare[label] for label in index.lone_labels}
        return dataclasses.replace(index, lone_samples=lone_samples)
