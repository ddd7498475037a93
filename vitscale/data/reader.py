"""Samples by id: one ranged read brings one chunk, and the walker takes it apart."""

from collections.abc import Iterable, Iterator, Mapping

from vitscale import storage
from vitscale.data.index import DataError, Index
from vitscale.data.samples import BadSample, RawSample, parse_samples

Chunk = list[RawSample | BadSample]


def read_chunk(index: Index, chunk: int) -> Chunk:
    """All samples of a chunk, as many as the index says; those that damage hides are BadSamples."""
    shard, start, end = index.chunk_range(chunk)
    count = int(index.chunk_counts[chunk])
    try:
        data = storage.read_range(shard.url, start, end)
    except FileNotFoundError:
        return [BadSample("?", "the shard is missing")] * count
    return parse_samples(data, start, count)


def read_window(index: Index, ids: Iterable[int], held: Mapping[int, Chunk]) -> dict[int, Chunk]:
    """The chunks that hold `ids`; those in `held` are taken from there instead of being read again."""
    chunks = sorted({index.chunk_of(sample_id) for sample_id in ids})
    return {chunk: held[chunk] if chunk in held else read_chunk(index, chunk) for chunk in chunks}


def pick(index: Index, chunks: Mapping[int, Chunk], sample_id: int) -> RawSample | BadSample:
    """One sample out of the chunks of read_window."""
    chunk = index.chunk_of(sample_id)
    return chunks[chunk][sample_id - int(index.chunk_first_ids[chunk])]


def read_samples(index: Index, ids: Iterable[int]) -> Iterator[RawSample]:
    """The samples of `ids`, in that order; ids in index order read each chunk once.

    Raises DataError at a damaged one: this serves evaluation and inspection, where nothing may be replaced.
    """
    chunks: dict[int, Chunk] = {}
    for sample_id in ids:
        chunks = read_window(index, [sample_id], chunks)
        sample = pick(index, chunks, sample_id)
        if isinstance(sample, BadSample):
            raise DataError(f"{describe(index, sample_id)}: sample {sample.key}: {sample.reason}")
        yield sample


def describe(index: Index, sample_id: int) -> str:
    """Where a sample lies, for messages."""
    return f"{index.chunk_range(index.chunk_of(sample_id))[0].url}, sample number {sample_id}"
