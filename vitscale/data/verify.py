"""Read a whole data set again and name all that is damaged."""

import functools
from collections.abc import Iterator

from vitscale import processes
from vitscale.config import ConfigError
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import DataError, Index, Progress
from vitscale.data.reader import describe, read_chunk
from vitscale.data.samples import BadSample
from vitscale.data.scan import Shard, scan_shard


def verify_index(
    index: Index, *, decode_images: bool = False, workers: int = 0, progress: Progress | None = None
) -> Iterator[str]:
    """Compare every shard with the index, by `workers` processes (0 = in this one): yields one sentence for
    each damaged place.

    decode_images: decode every image whole, too. Training decodes only its crops and does not notice damage
    behind them.
    """
    verify = functools.partial(_verify_shard, index=index, decode_images=decode_images)
    found = processes.map_in_order(verify, range(len(index.shards)), workers)
    for shard, damage in zip(index.shards, found, strict=True):
        yield from damage
        if progress:
            progress(shard.url)


def _verify_shard(number: int, index: Index, decode_images: bool) -> list[str]:
    shard = index.shards[number]
    try:
        scan = scan_shard(shard.url, index.chunk_samples, allow_damaged=True, listed=shard.num_samples + 1)
        damage = [*scan.damage, *(_damaged_images(index, number) if decode_images else ())]
    except (DataError, ConfigError) as error:
        return [str(error)]
    if scan.tar_damage:
        return damage
    if scan.shard == shard:
        first, end = index.layout.first_chunks[number : number + 2].tolist()
        same = index.chunks[first:end].tolist() == scan.chunks
        return damage if same else [*damage, f"{shard.url}: the index cuts it into other chunks"]
    return [*damage, f"{shard.url}: is not the shard that was indexed: {_difference(shard, scan.shard)}"]


def _damaged_images(index: Index, number: int) -> Iterator[str]:
    first, end = index.layout.first_chunks[number : number + 2].tolist()
    for chunk in range(first, end):
        for sample_id, sample in zip(index.layout.chunk_ids(chunk), read_chunk(index, chunk), strict=True):
            if isinstance(sample, BadSample):
                continue  # the scan has named it
            try:
                decode(sample.image)
            except DamagedImage as error:
                yield f"{describe(index, sample_id)}: sample {sample.key}: {error}"


def _difference(indexed: Shard, found: Shard) -> str:
    if indexed.num_bytes != found.num_bytes:
        return f"{found.num_bytes:,} bytes instead of {indexed.num_bytes:,}"
    if indexed.num_samples != found.num_samples:
        return f"{found.num_samples:,} samples instead of {indexed.num_samples:,}"
    return "its checksum differs"
