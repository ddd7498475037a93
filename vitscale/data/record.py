"""What a run keeps of its indexes, so that it can continue with shards whose damage was fixed.

A run continues only on the data that it was started with. Shards in which samples were fixed
have other bytes, and so another index. They are the same data set all the same if every shard
has as many samples as before, which keeps every sample's number and its place in every epoch,
and if every chunk is as it was or held a damaged sample.
"""

import dataclasses
import io
import logging
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from vitscale import atomic
from vitscale.data.index import Index, damaged_chunks
from vitscale.data.order import ShardLayout
from vitscale.data.reader import SamplePlace, parse_place
from vitscale.data.tar import BLOCK

logger = logging.getLogger(__name__)
FILE_NAME, VERSION = "data.npz", 1


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """The part of an Index that shows what another one changes. chunks: as in Index."""

    layout: ShardLayout
    chunks: np.ndarray  # [num_chunks]

    def change(self, index: Index, found: Collection[int]) -> str:
        """What `index` changes beside damaged chunks, as a clause; "" if nothing.

        found: the chunks in which the run itself found damage.
        """
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
        chunk = int(self.layout.chunk_of(np.array([place.sample_id]))[0])
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
        sources = tuple(SourceRecord(index.layout, index.chunks) for index in indexes)
        return cls(sources, (tuple(index.fingerprint() for index in indexes),))

    def change(self, indexes: Sequence[Index], replaced: Iterable[str]) -> str:
        """What the indexes change beside damaged samples, as a clause; "" if nothing.

        replaced: the run's sentences about the samples that it could not use.
        """
        places = [place for place in map(parse_place, replaced) if place]
        for source, index in zip(self.sources, indexes, strict=True):
            chunks = [source.chunk_at(place) for place in places]
            change = source.change(index, [chunk for chunk in chunks if chunk is not None])
            if change:
                return change
        return ""

    def followed_by(self, indexes: Sequence[Index]) -> "DataRecord":
        """The record once the run continues with `indexes`, in which damage was fixed."""
        new = DataRecord.of(indexes)
        if new.fingerprints[-1] == self.fingerprints[-1]:
            return self
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
                    )
                    for number in range(len(fingerprints[0]))
                )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            logger.warning("%s cannot be read: the run continues on the very same shards only", path)
            return None
        return cls(sources, fingerprints)
