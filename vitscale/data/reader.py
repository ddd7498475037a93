"""Samples by id: one ranged read brings one chunk, the index says whether it is intact, and the walker takes
it apart.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from vitscale import storage
from vitscale.data.cache import NodeCache
from vitscale.data.index import DataError, Index
from vitscale.data.samples import BadSample, RawSample, parse_samples

Chunk = list[RawSample | BadSample]

READS = 3  # a store, a network or a cache may deliver wrong bytes once


def read_chunk(index: Index, chunk: int, cache: NodeCache | None = None) -> Chunk:
    """All samples of a chunk, as many as the index says; those that damage hides are BadSamples.

    Bytes that are not those that were indexed are read again; when they stay wrong, no sample of the chunk
    can be trusted. cache: asked first, and given what was read, for chunks of remote shards.
    """
    shard, start, end = index.chunk_range(chunk)
    count = len(index.layout.chunk_ids(chunk))
    cache = None if storage.is_local(shard.url) else cache
    key = f"{shard.checksum} {start} {end}"
    data = b""
    for _ in range(READS):
        cached = cache.get(key) if cache else None
        try:
            data = storage.read_range(shard.url, start, end) if cached is None else cached
        except FileNotFoundError:
            return [BadSample("?", "the shard is missing")] * count
        if index.is_intact(chunk, data):
            if cache and cached is None:
                cache.put(key, data)
            return parse_samples(data, start, count)
        if cache:
            cache.drop(key)
    where = f"bytes {start:,} to {end:,} are not those that were indexed"
    return [_distrusted(sample, where) for sample in parse_samples(data, start, count)]


def read_samples(index: Index, ids: Iterable[int]) -> Iterator[RawSample]:
    """The samples of `ids`, in that order; ids in index order read each chunk once.

    Raises DataError at a damaged one: this serves evaluation and inspection, where nothing may be replaced.
    """
    held, samples = -1, Chunk()
    for sample_id in ids:
        chunk = int(index.layout.chunk_of(np.array([sample_id]))[0])
        if chunk != held:
            held, samples = chunk, read_chunk(index, chunk)
        sample = samples[sample_id - index.layout.chunk_ids(chunk).start]
        if isinstance(sample, BadSample):
            raise DataError(f"{describe(index, sample_id)}: sample {sample.key}: {sample.reason}")
        yield sample


def describe(index: Index, sample_id: int) -> str:
    """Where a sample lies, for messages: its shard, the bytes of its chunk, its number."""
    shard, start, end = index.chunk_range(int(index.layout.chunk_of(np.array([sample_id]))[0]))
    return f"{shard.url}, bytes {start:,} to {end:,}, sample number {sample_id:,}"


def _distrusted(sample: RawSample | BadSample, where: str) -> BadSample:
    reason = f": {sample.reason}" if isinstance(sample, BadSample) else ""
    return BadSample(sample.key, where + reason)
