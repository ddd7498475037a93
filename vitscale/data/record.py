"""What a run keeps of its indexes, so that it can continue with shards whose damage was fixed.

A run continues only on the data that it was started with. Shards in which samples were fixed
have other bytes, and so another index. They are the same data set all the same if every shard
has as many samples as before, which keeps every sample's number and its place in every epoch,
if every chunk is as it was or held a damaged sample, and if the labels are made as before.
"""

import dataclasses
import io
import json
import logging
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitscale.data.index import Index, damaged_chunks
from vitscale.data.order import ShardLayout
from vitscale.data.reader import SamplePlace, parse_place
from vitscale.data.samples import DEFAULT_KEYS, SampleKeys
from vitscale.data.tar import BLOCK
from vitscale.system import atomic

logger = logging.getLogger(__name__)
FILE_NAME, VERSION = "data.npz", 1


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """The part of an Index that shows what another one changes. chunks, keys: as in Index.

    keys: None in records of earlier commits.
    """

    layout: ShardLayout
    chunks: np.ndarray  # [num_chunks]
    keys: SampleKeys | None

    def change(self, index: Index, found: Collection[int]) -> str:
        """What `index`, of another fingerprint, changes beside damaged chunks; "" if nothing.

        The change is a clause. found: the chunks in which the run itself found damage.
        """
        if self.keys and (change := _change_of_keys(self.keys, index.keys)):
            return change
        before, now = self.layout.shard_samples, index.layout.shard_samples
        if len(before) != len(now):
            return f"the index held {len(before):,} shards, now {len(now):,}"
        if self.layout.chunk_samples != index.chunk_samples:
            held = self.layout.chunk_samples
            return f"the index had chunks of {held} samples, now of {index.chunk_samples}"
        for shard in np.flatnonzero(before != now).tolist():
            return f"{index.shards[shard].url} held {before[shard]:,} samples, now {now[shard]:,}"
        changed = np.zeros(len(self.chunks), dtype=bool)  # [num_chunks]
        for name in ("blocks", "checksum"):
            changed |= self.chunks[name] != index.chunks[name]
        if self.keys is None and not changed.any():
            return "no sample has changed, so the index was made with another image_key, label_key or classes"
        changed &= ~damaged_chunks(self.chunks)
        changed[list(found)] = False
        for chunk in np.flatnonzero(changed).tolist():
            url, ids = index.shards[index.layout.shard_of(chunk)].url, index.layout.chunk_ids(chunk)
            return f"{url} has changed in samples {ids[0]:,} to {ids[-1]:,}, none of which was damaged"
        return ""

    def chunk_at(self, place: SamplePlace) -> int | None:
        """The chunk of a sample that the run found damaged; None if it is of another index."""
        if place.sample_id >= self.layout.num_samples:
            return None
        chunk = self.layout.chunk_with(place.sample_id)
        first = int(self.layout.first_chunks[self.layout.shard_of(chunk)])
        end = int(self.chunks["blocks"][first : chunk + 1].sum(dtype=np.int64)) * BLOCK
        start = end - int(self.chunks["blocks"][chunk]) * BLOCK
        return chunk if (start, end) == (place.start, place.end) else None


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """The indexes of a run's sources, as they are kept in RUN/data.npz.

    fingerprints: of those indexes, by source, last; before it, of those that they replaced.
    """

    sources: tuple[SourceRecord, ...]
    fingerprints: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, indexes: Sequence[Index]) -> "DataRecord":
        """The record of a run that begins with these indexes."""
        sources = tuple(SourceRecord(index.layout, index.chunks, index.keys) for index in indexes)
        return cls(sources, (tuple(index.fingerprint() for index in indexes),))

    def change(self, indexes: Sequence[Index], replaced: Iterable[str]) -> str:
        """What the indexes change beside damaged samples, as a clause; "" if nothing.

        replaced: the run's sentences about the samples that it could not use, which may be
        many: they are read only if an index is another one.
        """
        before = zip(self.sources, indexes, self.fingerprints[-1], strict=True)
        others = [(source, index) for source, index, name in before if index.fingerprint() != name]
        # A sample that is not fixed is replaced again in each epoch.
        places = {place for place in map(parse_place, replaced if others else ()) if place}
        for source, index in others:
            chunks = [source.chunk_at(place) for place in places]
            change = source.change(index, [chunk for chunk in chunks if chunk is not None])
            if change:
                return change
        return ""

    def followed_by(self, indexes: Sequence[Index]) -> "DataRecord":
        """The record once the run continues with `indexes`, in which damage was fixed."""
        new = DataRecord.of(indexes)
        if new.fingerprints[-1] == self.fingerprints[-1]:
            has_keys = all(source.keys for source in self.sources)
            return self if has_keys else dataclasses.replace(self, sources=new.sources)
        return dataclasses.replace(new, fingerprints=self.fingerprints + new.fingerprints)

    def save(self, run_dir: str | Path) -> None:
        """Write the file of a run directory, whole or not at all."""
        arrays = {"version": np.array(VERSION), "fingerprints": np.array(self.fingerprints)}
        for number, source in enumerate(self.sources):
            arrays |= {
                f"chunk_samples_{number}": np.array(source.layout.chunk_samples),
                f"shard_samples_{number}": source.layout.shard_samples,
                f"chunks_{number}": source.chunks,
            }
            if source.keys:
                arrays[f"keys_{number}"] = np.array(json.dumps(dataclasses.asdict(source.keys)).encode())
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        atomic.write(Path(run_dir) / FILE_NAME, buffer.getvalue())

    @classmethod
    def load(cls, run_dir: str | Path) -> "DataRecord | None":
        """The record of a run directory; None if it has none, or one that cannot be read."""
        path = Path(run_dir) / FILE_NAME
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if arrays["version"] != VERSION:
                    raise ValueError(f"version {arrays['version']}")
                fingerprints = tuple(map(tuple, arrays["fingerprints"].tolist()))
                sources = tuple(
                    SourceRecord(
                        ShardLayout(
                            arrays[f"shard_samples_{number}"], int(arrays[f"chunk_samples_{number}"])
                        ),
                        arrays[f"chunks_{number}"],
                        _read_keys(arrays, number),
                    )
                    for number in range(len(fingerprints[0]))
                )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
            logger.warning("%s cannot be read: the run continues on the very same shards only", path)
            return None
        return cls(sources, fingerprints)


def _read_keys(arrays: Mapping[str, np.ndarray], number: int) -> SampleKeys | None:
    name = f"keys_{number}"
    return SampleKeys(**json.loads(arrays[name].item())) if name in arrays else None


def _change_of_keys(before: SampleKeys, now: SampleKeys) -> str:
    """Which images or labels `now` finds otherwise, as a clause; "" if none that could be used.

    Samples of a class that had no label could not be used: such a class may be added.
    """
    if before.strict and not now.strict:  # what is strict about it is damage
        before = DEFAULT_KEYS
    for name in ("image_key", "label_key", "strict"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            return f"the index was made with {name} {old!r}, now with {new!r}"
    for name in sorted(before.classes.keys() | now.classes.keys()):
        old, new = before.classes.get(name), now.classes.get(name)
        was_number = re.fullmatch(r"[\d\s,]+", name)
        if old != new and (old is not None or was_number):
            return f"the index was made with {_class(name, old)}, now with {_class(name, new)}"
    return ""


def _class(name: str, label: int | None) -> str:
    return f"no class {name!r}" if label is None else f"class {name!r} as label {label}"
