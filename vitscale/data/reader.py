"""Samples by id: one ranged read gets a chunk, the index says whether it is intact, and the tar
walker takes it apart.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vitscale.data.cache import NodeCache
from vitscale.data.index import Index
from vitscale.data.samples import BadSample, RawSample, parse_samples
from vitscale.data.scan import Shard
from vitscale.errors import DataError
from vitscale.redaction import redact
from vitscale.stores import storage

Chunk = list[RawSample | BadSample]


def read_chunk(index: Index, chunk: int, cache: NodeCache | None = None) -> Chunk:
    """All samples of a chunk, as many as the index says; BadSamples where damage hides them.

    Bytes that differ from those that were indexed are read again: from a disk once, from a
    store with the pauses and as often as after errors. If they still differ, no sample of the
    chunk can be trusted, and all are BadSamples. cache: for chunks of remote shards, asked
    first and given what was read.
    """
    shard, start, end = index.chunk_range(chunk)
    count = len(index.layout.chunk_ids(chunk))
    cache = None if storage.is_local(shard.url) else cache
    key = cache_key(shard, start, end)
    is_right = functools.partial(index.is_intact, chunk)
    cached = cache.get(key) if cache else None
    if cached is not None and is_right(cached):
        return parse_samples(cached, start, count, index.keys)
    try:
        data = storage.read_range(shard.url, start, end, is_right)
    except FileNotFoundError:
        return [BadSample("?", "the shard is missing")] * count
    if is_right(data):
        if cache:
            cache.put(key, data)
        return parse_samples(data, start, count, index.keys)
    where = f"bytes {start:,} to {end:,} are not those that were indexed"
    return [_distrusted(sample, where) for sample in parse_samples(data, start, count, index.keys)]


def cache_key(shard: Shard, start: int, end: int) -> str:
    """The key of the chunk with the bytes [start, end) of a shard in a node's cache."""
    return f"{shard.checksum} {start} {end}"


def read_samples(index: Index, ids: Sequence[int]) -> Iterator[RawSample]:
    """The samples of `ids`, as read_any; raises DataError at one that is damaged."""
    for sample_id, sample in zip(ids, read_any(index, ids), strict=True):
        if isinstance(sample, BadSample):
            raise DataError(f"{describe(index, sample_id)}: {sample.describe()}")
        yield sample


def read_any(index: Index, ids: Sequence[int]) -> Iterator[RawSample | BadSample]:
    """The samples of `ids`, in that order; for rising ids, each chunk is read once."""
    read, samples = -1, Chunk()  # the chunk that was read last
    for sample_id in ids:
        chunk = index.layout.chunk_with(sample_id)
        if chunk != read:
            read, samples = chunk, read_chunk(index, chunk)
        yield samples[sample_id - index.layout.chunk_ids(chunk).start]


def describe(index: Index, sample_id: int) -> str:
    """Where a sample is, for messages: its shard, the bytes of its chunk, its number."""
    shard, start, end = index.chunk_range(index.layout.chunk_with(sample_id))
    return f"{redact(shard.url)}, bytes {start:,} to {end:,}, sample number {sample_id:,}"


class SamplePlace(NamedTuple):
    """A sample's id, and the bytes [start, end) of its chunk in its shard."""

    start: int
    end: int
    sample_id: int


def parse_place(sentence: str) -> SamplePlace | None:
    """The place in a sentence that begins as `describe` writes it; None if there is none."""
    match = re.search(r", bytes ([\d,]+) to ([\d,]+), sample number ([\d,]+)", sentence)
    return SamplePlace(*(int(number.replace(",", "")) for number in match.groups())) if match else None


def _distrusted(sample: RawSample | BadSample, where: str) -> BadSample:
    """A sample of a chunk that is not as it was indexed, as a bad one."""
    found = sample.reason if isinstance(sample, BadSample) else ""
    return BadSample(sample.key, where, found)
