"""One pass over one shard: what it holds, where its chunks are, and what is damaged."""

import collections
import dataclasses
from collections.abc import Mapping

import xxhash

from vitscale.data.samples import BadSample, RawSample, SampleKeys, group
from vitscale.data.tar import BLOCK, Bytes, Readable, TarDamage, compression, decompress_hint, walk
from vitscale.errors import DataError, StoreError
from vitscale.stores import storage

LISTED = 20  # damaged samples that are named one by one; all are counted
LONE_SAMPLES = 3  # a label stands alone with fewer, and above twice the number of labels
_MAX_KINDS = 100  # of reasons and of extensions that are counted apart
_OTHERS = "others"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file. data_bytes: where its last sample ends. checksum: its xxh3-128, in hex.

    url: without a query, which may be a secret; indexes of version 2 may hold one.
    """

    url: str
    num_bytes: int
    data_bytes: int
    num_samples: int
    checksum: str


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What was found in a shard, or in several.

    label_counts: samples by label. num_damaged: samples that cannot be used; `damage` has a
    sentence for each of the first damaged places, the archives themselves among them. reasons:
    by reason, how many places, and where the first is. repeated_keys: how many usable samples
    have the key of an earlier one of their shard, and where the first is. passed_over: by
    extension, how many files are neither image nor label. hash_ranges: by label, the lowest and
    the highest hash of its samples' keys. num_neighbours: pairs of consecutive samples of a
    shard that can be used. shared_labels: how many labels they have in common, added up.
    """

    label_counts: dict[int, int] = dataclasses.field(default_factory=dict)
    max_labels: int = 0
    damage: list[str] = dataclasses.field(default_factory=list)
    num_damaged: int = 0
    reasons: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    repeated_keys: tuple[int, str] = (0, "")
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    hash_ranges: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    num_neighbours: int = 0
    shared_labels: int = 0

    def add(self, other: "Findings") -> None:
        """Add those of a shard that follows; the first LISTED places stay."""
        for label, count in other.label_counts.items():
            self.label_counts[label] = self.label_counts.get(label, 0) + count
        self.max_labels = max(self.max_labels, other.max_labels)
        self.damage += other.damage[: LISTED - len(self.damage)]
        self.num_damaged += other.num_damaged
        for reason, (count, example) in other.reasons.items():
            add_reason(self.reasons, reason, count, example)
        self.add_repeated(*other.repeated_keys)
        add_counts(self.passed_over, other.passed_over)
        for label, (lowest, highest) in other.hash_ranges.items():
            widen(self.hash_ranges, label, lowest, highest)
        self.num_neighbours += other.num_neighbours
        self.shared_labels += other.shared_labels

    def add_repeated(self, count: int, example: str) -> None:
        """Count samples whose keys are an earlier one's; example: where the first is."""
        self.repeated_keys = self.repeated_keys[0] + count, self.repeated_keys[1] or example


@dataclasses.dataclass(kw_only=True)
class Scan:
    """What a pass over a shard found.

    version: that of storage.versions when the pass began. chunks: (blocks of 512 bytes,
    checksum) of each. tar_damage: whether the archive itself is broken. damaged_chunks: those
    that hold damaged samples, by number in the shard. rare: by label, the samples of labels
    that may stand alone in the whole set (is_lone). key_hashes: of all samples, in order.
    """

    shard: Shard
    version: str
    chunks: list[tuple[int, int]]
    tar_damage: bool
    damaged_chunks: list[int]
    rare: dict[int, list[str]]
    key_hashes: list[int]
    found: Findings


def is_lone(label: int, count: int, num_labels: int) -> bool:
    """Whether a label of `count` samples, among `num_labels` labels, is probably a mistake."""
    return count < LONE_SAMPLES and label > 2 * num_labels


def chunk_checksum(data: bytes | memoryview) -> int:
    """A chunk's checksum in the index, compared at every read: 16 bits of its xxh3-64."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFF


def key_hash(key: str) -> int:
    """16 bits of the hash of a sample's key, which say whether the sample validates."""
    return xxhash.xxh3_64_intdigest(key.encode()) & 0xFFFF


def widen(ranges: dict[int, tuple[int, int]], label: int, lowest: int, highest: int) -> None:
    """Let the range of a label's hashes hold two more."""
    low, high = ranges.get(label, (lowest, highest))
    ranges[label] = (min(low, lowest), max(high, highest))


def add_reason(reasons: dict[str, tuple[int, str]], reason: str, count: int, example: str) -> None:
    """Count `count` more samples with the reason; the first example of each reason stays."""
    reason = reason if reason in reasons or len(reasons) < _MAX_KINDS else _OTHERS
    so_far, first = reasons.get(reason, (0, example))
    reasons[reason] = (so_far + count, first)


def commonest(reasons: Mapping[str, tuple[int, str]], number: int = 3) -> list[str]:
    """The commonest reasons for damage, each with its number and an example."""
    by_count = sorted(reasons.items(), key=lambda item: -item[1][0])[:number]
    return [f"{reason} ({count:,} times, like {example})" for reason, (count, example) in by_count]


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add up counts by extension, of which a damaged shard may have as many as files."""
    for name, count in more.items():
        name = name if name in counts or len(counts) < _MAX_KINDS else _OTHERS
        counts[name] = counts.get(name, 0) + count


def scan_shard(
    url: str, chunk_samples: int, *, allow_damaged: bool, keys: SampleKeys, listed: int = LISTED
) -> Scan:
    """Read a shard from beginning to end.

    allow_damaged: keep the whole samples before the damage of a cut or broken shard. Samples
    that cannot be used (no label, not an image) are always kept, and count as damage. listed:
    how many damaged places get a sentence. Raises DataError for a shard that is missing, empty
    or compressed and, without `allow_damaged`, cut or broken; StoreError for one that cannot be
    read.
    """
    name = storage.without_query(url)
    builder = _ScanBuilder(name, listed)
    chunks = _ChunkCutter()
    try:
        (version,) = storage.versions([url])
        with storage.open_stream(url) as raw:
            stream = _RecordingStream(raw, chunks)
            try:
                for sample, start in group(walk(stream, whole=True), keys, builder.passed_over):
                    if builder.num_samples % chunk_samples == 0 and builder.num_samples:
                        chunks.cut(start)
                    builder.add(sample, len(chunks.finished))
                data_bytes = stream.count - BLOCK
                while rest := stream.read(1 << 20):
                    if any(rest):
                        raise TarDamage(data_bytes, "an empty block, and data after it")
            except TarDamage as error:
                if program := "" if builder.num_samples else compression(bytes(chunks.pending[:8])):
                    raise DataError(f"shard {name} {decompress_hint(name, program)}") from None
                data_bytes = error.whole_until
                builder.tar_damage = f"{name}: {error}; {builder.num_samples:,} whole samples before it"
            if builder.num_samples:
                chunks.cut(data_bytes)
            stream.recording = False
            while stream.read(1 << 20):  # to the end, for the shard's checksum
                pass
    except FileNotFoundError:
        raise DataError(f"shard {name} does not exist") from None
    except IsADirectoryError:
        folder = name.rstrip("/")
        raise StoreError(f'shard {name} is a folder; name its shards: "{folder}/*.tar"') from None
    except OSError as error:
        raise StoreError(f"shard {name} cannot be read: {error.strerror or error}") from None
    builder.refuse(allow_damaged)
    shard = Shard(
        url=name,
        num_bytes=stream.count,
        data_bytes=data_bytes if builder.num_samples else 0,
        num_samples=builder.num_samples,
        checksum=stream.hash.hexdigest(),
    )
    return builder.scan(shard, version, chunks.finished)


class _ScanBuilder:
    """Adds the samples of a shard up to its scan."""

    def __init__(self, url: str, listed: int) -> None:
        self.url, self.listed = url, listed
        self.num_samples = 0
        self.found = Findings()
        self.passed_over: collections.Counter[str] = collections.Counter()
        self.samples_by_label: dict[int, list[str]] = {}  # the first of each label
        self.damaged_chunks: dict[int, None] = {}  # in the order of the shard, each once
        self.key_hashes: list[int] = []
        self.tar_damage = ""
        self._keys: set[str] = set()
        self._last_labels: frozenset[int] | None = None

    def add(self, sample: RawSample | BadSample, chunk: int) -> None:
        self.num_samples += 1
        self.key_hashes.append(key_hash(sample.key))
        if isinstance(sample, BadSample):
            self._add_bad(sample, chunk)
        else:
            self._add_usable(sample, self.key_hashes[-1])
        self._keys.add(sample.key)

    def refuse(self, allow_damaged: bool) -> None:
        """Raise DataError for a shard that is empty or, unless it is allowed, damaged."""
        if self.tar_damage and not allow_damaged:
            raise DataError(
                f"{self.tar_damage}; restore the shard, leave it out, or keep those: python tools/data.py "
                "index SHARDS --allow-damaged, and name the index.json"
            )
        if not self.num_samples and not self.tar_damage:
            raise DataError(f"shard {self.url} is empty: it holds no sample; leave it out")
        if self.tar_damage:
            self.found.damage.append(self.tar_damage)
            add_reason(self.found.reasons, "a broken archive", 1, self.tar_damage)

    def scan(self, shard: Shard, version: str, chunks: list[tuple[int, int]]) -> Scan:
        add_counts(self.found.passed_over, self.passed_over)
        counts = self.found.label_counts
        return Scan(
            shard=shard,
            version=version,
            chunks=chunks,
            tar_damage=bool(self.tar_damage),
            damaged_chunks=list(self.damaged_chunks),
            rare={
                label: samples
                for label, samples in self.samples_by_label.items()
                if is_lone(label, counts[label], len(counts))
            },
            key_hashes=self.key_hashes,
            found=self.found,
        )

    def _add_usable(self, sample: RawSample, hashed: int) -> None:
        found = self.found
        if sample.key in self._keys:
            found.add_repeated(1, f"{self.url}: sample {sample.key}")
        for label in sample.labels:
            found.label_counts[label] = found.label_counts.get(label, 0) + 1
            widen(found.hash_ranges, label, hashed, hashed)
            if found.label_counts[label] < LONE_SAMPLES:
                place = f"{self.url}: sample {sample.key}"
                self.samples_by_label.setdefault(label, []).append(place)
        found.max_labels = max(found.max_labels, len(sample.labels))
        labels = frozenset(sample.labels)
        if self._last_labels is not None:
            found.num_neighbours += 1
            found.shared_labels += len(labels & self._last_labels)
        self._last_labels = labels

    def _add_bad(self, sample: BadSample, chunk: int) -> None:
        self.found.num_damaged += 1
        self.damaged_chunks[chunk] = None
        add_reason(self.found.reasons, sample.reason, 1, sample.place(self.url))
        if len(self.found.damage) < self.listed:
            self.found.damage.append(f"{self.url}: {sample.describe()}")


class _ChunkCutter:
    """Cuts what was read into chunks: a cut is known only after bytes beyond it were read."""

    def __init__(self) -> None:
        self.finished: list[tuple[int, int]] = []
        self.pending = bytearray()
        self._start = 0

    def cut(self, end: int) -> None:
        """End the current chunk at byte `end` of the shard."""
        size = end - self._start
        self.finished.append((size // BLOCK, chunk_checksum(bytes(self.pending[:size]))))
        del self.pending[:size]
        self._start = end


class _RecordingStream:
    """Counts and hashes what is read through it, and hands it to the chunk cutter."""

    def __init__(self, stream: Readable, chunks: _ChunkCutter) -> None:
        self._stream, self._chunks, self.recording = stream, chunks, True
        self.hash, self.count = xxhash.xxh3_128(), 0

    def read(self, size: int = -1, /) -> Bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.count += len(data)
        if self.recording:
            self._chunks.pending += data
        return data
