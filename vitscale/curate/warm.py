"""Fills a node's cache with the chunks of a run's remote shards, before the run starts."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from vitscale.data.cache import NodeCache
from vitscale.data.index import Index
from vitscale.data.reader import cache_key, read_chunk
from vitscale.data.samples import BadSample
from vitscale.data.sources import Source
from vitscale.errors import ConfigError
from vitscale.stores import storage
from vitscale.system import atomic
from vitscale.system.processes import ProgressCallback, no_progress

THREADS = 16  # they wait for the store, not for a core


class Warmed(NamedTuple):
    """What the cache holds: num_bytes of total_bytes, in chunks of remote shards.

    wanted_bytes: of the shards that fit. num_bad: samples that cannot be used.
    """

    num_bytes: int
    wanted_bytes: int
    total_bytes: int
    num_bad: int


def warm_cache(
    sources: tuple[Source, ...], folder: str, max_bytes: int, progress: ProgressCallback = no_progress
) -> Warmed:
    """Read chunks of remote shards into the cache, in the shards' order, until it is full.

    What the cache holds already is not read from the store again. progress: called with numbers
    of shards. Raises ConfigError if no shard is remote, and StoreError if a store fails or the
    folder cannot be written.
    """
    cache = NodeCache(folder, max_bytes)
    shards = [
        (source.index, number)
        for source in sources
        for number, shard in enumerate(source.index.shards)
        if not storage.is_local(shard.url)
    ]
    if not shards:
        raise ConfigError("all shards are on local disks, which need no cache; name shards in a store")
    atomic.check_folder(folder)
    kept: list[tuple[Index, int]] = []
    wanted_bytes = 0
    for index, number in shards:
        if wanted_bytes + index.shards[number].data_bytes > max_bytes:
            break
        kept.append((index, number))
        wanted_bytes += index.shards[number].data_bytes
    for url in {storage.scheme(i.shards[n].url): i.shards[n].url for i, n in kept}.values():
        storage.connect(url)
    progress(0, len(kept))
    num_bad = 0
    with ThreadPoolExecutor(THREADS) as threads:
        warmed = threads.map(functools.partial(_warm_shard, cache), *zip(*kept, strict=True)) if kept else ()
        for num_done, bad in enumerate(warmed, 1):
            num_bad += bad
            progress(num_done, len(kept))
    num_bytes = sum(_held_bytes(cache, index, number) for index, number in kept)
    total_bytes = sum(index.shards[number].data_bytes for index, number in shards)
    return Warmed(num_bytes, wanted_bytes, total_bytes, num_bad)


def _chunks_of(index: Index, shard: int) -> range:
    first, end = index.layout.first_chunks[shard : shard + 2].tolist()
    return range(first, end)


def _held_bytes(cache: NodeCache, index: Index, shard: int) -> int:
    """The bytes of a shard's chunks that are in the cache."""
    places = map(index.chunk_range, _chunks_of(index, shard))
    return sum(place[2] - place[1] for place in places if cache.holds(cache_key(*place)))


def _warm_shard(cache: NodeCache, index: Index, shard: int) -> int:
    """Read a shard's chunks through the cache; the number of samples that cannot be used."""
    chunks = (read_chunk(index, chunk, cache) for chunk in _chunks_of(index, shard))
    return sum(isinstance(sample, BadSample) for chunk in chunks for sample in chunk)
