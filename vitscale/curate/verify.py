"""Reads a whole data set again and names everything that is damaged."""

import dataclasses
import functools
from collections.abc import Iterator

from vitscale.data.decode import DamagedImage, decode
from vitscale.data.index import Index
from vitscale.data.reader import describe, read_chunk
from vitscale.data.samples import BadSample
from vitscale.data.scan import Shard, scan_shard
from vitscale.errors import UserError
from vitscale.system.processes import ProgressCallback, map_in_order, no_progress


def verify_index(
    index: Index, *, decode_images: bool = False, workers: int = 0, progress: ProgressCallback = no_progress
) -> Iterator[str]:
    """Compare every shard with the index and yield one sentence for each damaged place.

    decode_images: also decode every image completely. Training decodes only its crops and does
    not notice damage outside them.
    workers: number of processes; 0 works in this one.
    progress: called with numbers of shards.
    """
    num_shards = len(index.shards)
    verify_shard = functools.partial(_verify_shard, index=index, decode_images=decode_images)
    progress(0, num_shards)
    for num_done, damage in enumerate(map_in_order(verify_shard, range(num_shards), workers), 1):
        yield from damage
        progress(num_done, num_shards)


def _verify_shard(shard_number: int, index: Index, decode_images: bool) -> list[str]:
    shard = index.shards[shard_number]
    try:
        scan = scan_shard(
            shard.url,
            index.chunk_samples,
            allow_damaged=True,
            keys=index.keys,
            listed=shard.num_samples + 1,
        )
        damage = [*scan.found.damage, *(_damaged_images(index, shard_number) if decode_images else ())]
    except UserError as error:
        return [str(error)]
    name = scan.shard.url  # without the query that an index of version 2 may hold
    if scan.shard == dataclasses.replace(shard, url=name):
        first, end = index.layout.first_chunks[shard_number : shard_number + 2].tolist()
        same = index.chunks[["blocks", "checksum"]][first:end].tolist() == scan.chunks
        return damage if same else [*damage, f"{name}: the index cuts it into other chunks"]
    return [*damage, f"{name}: is not the shard that was indexed: {_difference(shard, scan.shard)}"]


def _damaged_images(index: Index, shard_number: int) -> Iterator[str]:
    first, end = index.layout.first_chunks[shard_number : shard_number + 2].tolist()
    for chunk in range(first, end):
        for sample_id, sample in zip(index.layout.chunk_ids(chunk), read_chunk(index, chunk), strict=True):
            if isinstance(sample, BadSample):
                continue  # the scan has reported it
            try:
                decode(sample.image)
            except DamagedImage as error:
                yield f"{describe(index, sample_id)}: sample {sample.key}: {error}"


def _difference(indexed: Shard, scanned: Shard) -> str:
    if indexed.num_bytes != scanned.num_bytes:
        return f"{scanned.num_bytes:,} bytes instead of {indexed.num_bytes:,}"
    if indexed.num_samples != scanned.num_samples:
        return f"{scanned.num_samples:,} samples instead of {indexed.num_samples:,}"
    return "its checksum differs"
