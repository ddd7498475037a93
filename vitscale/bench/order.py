"""`tools/bench.py order`: what the order of a JFT-sized data set costs, and that it is right.

The index is synthetic, of real size and in the real format. One real shard stands for all of
them, so that the loader reads and decodes real images.
"""

import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image

from vitscale import rng
from vitscale.config import positive
from vitscale.data.index import Index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream, batches
from vitscale.data.mixture import Mixture, default_lanes
from vitscale.data.samples import DEFAULT_KEYS
from vitscale.data.scan import chunk_checksum, scan_shard
from vitscale.data.sources import Source
from vitscale.data.tar import BLOCK, walk
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.stores import storage

CHUNK, WINDOW_CHUNKS = 32, 2
SEEKS = 50
BLOCK_POSITIONS = 1 << 20
LOADER_STEPS = 4
MADE = 2  # how the synthetic data set is made: raised with every change of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderBench:
    """The size of the measurement.

    samples, shards: of the synthetic data set.
    world: how many ranks share it; global_batch: their images per step.
    sample_bytes: of a stored JPEG; 110,000 is the average of ImageNet's originals.
    workers: data workers of a rank.
    chunk_order: as data.chunk_order.
    folder: for the synthetic data set.
    """

    samples: int = 303_000_000
    shards: int = 30_000
    world: int = 1024
    global_batch: int = 4096
    sample_bytes: int = 110_000
    workers: int = 8
    chunk_order: Literal["shuffled", "stratified"] = "shuffled"
    folder: Path = Path("data/bench-order")

    def __post_init__(self) -> None:
        sizes = {"--global-batch": self.global_batch, "--sample-bytes": self.sample_bytes}
        positive("", **{"--shards": self.shards, "--world": self.world, **sizes})
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers} must be 0 or more")
        least = max(CHUNK * self.shards, 4 * self.global_batch)
        if self.samples < least:
            raise ConfigError(
                f"--samples {self.samples} must be at least {least}: {CHUNK} for each of the {self.shards} "
                f"shards, and four times --global-batch {self.global_batch}; set it, or lower these"
            )
        lanes = default_lanes(self.global_batch)
        if lanes % self.world:
            raise ConfigError(
                f"--world {self.world} must divide the {lanes} lanes of --global-batch {self.global_batch}"
            )


def run(config: OrderBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the index and measure; memory and start-up are measured in fresh processes."""
    progress("writing the synthetic index and shard")
    index_file = write_index(config)
    array = index_file.with_name(json.loads(index_file.read_bytes())["chunks"]["file"])
    results: dict[str, Any] = {
        "index_megabytes": (index_file.stat().st_size + array.stat().st_size) / 1e6,
    }
    progress("start-up and seek, in a fresh process")
    results |= _in_fresh_process(probe_order, config)
    lanes = default_lanes(config.global_batch)
    for world in dict.fromkeys((config.world, math.gcd(lanes, 8))):
        progress(f"the loader of one of {world} ranks, in a fresh process")
        measured = _in_fresh_process(probe_loader, dataclasses.replace(config, world=world))
        results |= {f"{name}_at_world_{world}": value for name, value in measured.items()}
    mixture = order_of(Index.load(str(index_file)), config)
    progress("every position of an epoch, against a bitmap")
    results |= prove_epoch(mixture)
    progress("ranks and steps")
    results |= prove_ranks(mixture, config.world)
    results |= shuffle_quality(mixture)
    return results


def write_index(config: OrderBench) -> Path:
    """An index of `samples` in `shards` of unequal size (5% apart), all of one real file."""
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "index.json"
    marker = config.folder / "made.json"  # what the index in this folder was made for
    wanted = json.dumps([MADE, config.samples, config.shards, config.sample_bytes])
    if marker.exists() and marker.read_text() == wanted:
        return path
    counts = _shard_sizes(config)
    scan = scan_shard(_write_shard(config, int(counts.max())), CHUNK, allow_damaged=False, keys=DEFAULT_KEYS)
    ends = np.cumsum([0, *(blocks for blocks, _ in scan.chunks)]) * BLOCK
    partial = functools.cache(lambda full, rest: _partial_chunk(scan.shard.url, int(ends[full]), rest))
    chunks, shards = [], []
    for count in counts.tolist():
        full, rest = divmod(count, CHUNK)
        last = [partial(full, rest)] if rest else []
        chunks += [*scan.chunks[:full], *last]
        data_bytes = int(ends[full]) + sum(blocks for blocks, _ in last) * BLOCK
        shards.append(dataclasses.replace(scan.shard, num_samples=count, data_bytes=data_bytes))
    records = np.empty(len(chunks), dtype=[("blocks", "<u2"), ("checksum", "<u2")])
    records["blocks"], records["checksum"] = np.array(chunks).T
    labels = {1: config.samples}  # as in the one shard
    Index(shards=tuple(shards), chunk_samples=CHUNK, chunks=records, label_counts=labels, max_labels=1).save(
        path
    )
    marker.write_text(wanted)
    return path


def _shard_sizes(config: OrderBench) -> np.ndarray:
    """Unequal sizes that add up to all samples, and whose last chunks have several lengths."""
    mean = config.samples / config.shards
    draws = rng.uniform(config.shards, 0, "demo", 99)
    counts = (mean * (0.95 + 0.1 * draws) / CHUNK).astype(np.int64) * CHUNK
    counts += np.array([0, 7, 19])[np.arange(config.shards) % 3]
    missing = (config.samples - int(counts.sum())) // CHUNK
    counts += CHUNK * (missing // config.shards)
    counts[: missing % config.shards] += CHUNK
    counts[-1] += config.samples - counts.sum()
    return counts


def _partial_chunk(path: str, start: int, num_samples: int) -> tuple[int, int]:
    """Blocks and checksum of the first `num_samples` samples of the chunk at byte `start`."""
    with open(path, "rb") as file:
        file.seek(start)
        members = itertools.islice(walk(file, start, whole=True), 2 * num_samples)
        sizes = [BLOCK + -(-len(member.data) // BLOCK) * BLOCK for member in members]
    data = storage.read_range(path, start, start + sum(sizes))
    return len(data) // BLOCK, chunk_checksum(data)


def probe_order(config: OrderBench) -> dict[str, float]:
    """Start-up of one rank (from index file to the first batch's ids), seeks, and memory."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    mixture = order_of(Index.load(str(config.folder / "index.json")), config)
    lanes = mixture.rank_lanes(config.world // 2, config.world)
    mixture.batch_ids(0, lanes)
    startup = time.perf_counter() - began
    steps = (rng.uniform(SEEKS, 0, "demo", 98) * mixture.steps_per_epoch).astype(int)
    seeks = []
    for step in steps.tolist():
        began = time.perf_counter()
        mixture.batch_ids(step, lanes)
        seeks.append(time.perf_counter() - began)
    began = time.perf_counter()
    mixture.batch_ids(5 * mixture.steps_per_epoch, lanes)
    return {
        "startup_seconds": startup,
        "seek_milliseconds": 1e3 * median(seeks),
        "seek_milliseconds_worst": 1e3 * max(seeks),
        "seek_to_another_epoch_seconds": time.perf_counter() - began,
        "order_megabytes_resident": (process.memory_info().rss - before) / 1e6,
    }


def probe_loader(config: OrderBench) -> dict[str, float]:
    """Memory of the data side of one rank.

    That is its workers, and what this process holds beyond Python and torch.
    """
    process = psutil.Process()
    torch.zeros(1)
    before = process.memory_full_info().pss
    index = Index.load(str(config.folder / "index.json"))
    mixture = order_of(index, config)
    stream = Stream(
        sources=(Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64)),),
        mixture=mixture,
        view_config=ViewConfig(AugmentConfig(), "simplejpeg", 224, 1000),
        lanes=mixture.rank_lanes(config.world // 2, config.world),
        first_step=mixture.steps_per_epoch // 2,
        last_step=mixture.steps_per_epoch,
    )
    most, workers = 0.0, 0
    for step, batch in enumerate(batches(stream, config.workers)):
        assert not batch.bad, batch.bad[0]
        children = process.children()
        pss = (
            sum(child.memory_full_info().pss for child in children) + process.memory_full_info().pss - before
        )
        most, workers = max(most, pss / 1e6), len(children)
        if step + 1 == LOADER_STEPS:
            break
    return {"data_side_megabytes": most, "workers": workers}


def prove_epoch(mixture: Mixture) -> dict[str, Any]:
    """Map every position of an epoch to its sample: all but the tail must come, once each."""
    order = mixture.orders[0]
    seen = np.zeros(order.layout.num_samples, dtype=np.bool_)
    used = order.lanes * order.lane_length
    epoch, marked = order.epoch(0), 0
    for start in range(0, used, BLOCK_POSITIONS):
        ids = epoch.sample_ids(range(start, min(used, start + BLOCK_POSITIONS)))
        marked += len(ids)
        seen[ids] = True
    return {
        "positions": marked,
        "samples_seen": int(seen.sum()),
        "tail": order.tail,
        "nothing_lost_or_repeated": bool(seen.sum() == marked == order.layout.num_samples - order.tail),
    }


def prove_ranks(mixture: Mixture, world: int, ranks: int = 8, steps: int = 64) -> dict[str, Any]:
    """Walk some ranks through steps in the middle of an epoch.

    No two may read the same sample, and what they read must be their slices of the batches.
    """
    first = mixture.steps_per_epoch // 2
    steps = min(steps, mixture.steps_per_epoch - first)
    chosen = sorted({0, world - 1, *(rng.permutation(world, 0, "demo", 97)[: ranks - 2].tolist())})
    parts = []
    for rank in chosen:
        lanes = mixture.rank_lanes(rank, world)
        draws = first * mixture.draws_per_step
        for lane in lanes:
            parts.append(mixture.orders[0].lane_ids(lane, draws, steps * mixture.draws_per_step))
    ids = np.concatenate(parts)
    batch, per_rank = mixture.batch_ids(first, range(mixture.lanes)), mixture.global_batch // world
    slices = [
        np.array_equal(  # with a global batch of 4096 on 1024 ranks, rank 3 reads batch[12:16]
            mixture.batch_ids(first, mixture.rank_lanes(rank, world)),
            batch[rank * per_rank : (rank + 1) * per_rank],
        )
        for rank in chosen
    ]
    return {
        "ranks_walked": len(chosen),
        "ids_walked": len(ids),
        "ranks_do_not_overlap": bool(len(np.unique(ids)) == len(ids) and all(slices)),
    }


def shuffle_quality(mixture: Mixture, num_batches: int = 32) -> dict[str, float]:
    """How mixed a batch is: its shards, and its samples' mean gap, beside uniform draws."""
    layout, size = mixture.orders[0].layout, mixture.global_batch
    num_batches = min(num_batches, mixture.steps_per_epoch)
    num_shards = len(layout.shard_samples)
    shards, gaps = [], []
    for step in range(num_batches):
        ids = mixture.batch_ids(step * (mixture.steps_per_epoch // num_batches), range(mixture.lanes))
        shards.append(len(np.unique(np.searchsorted(layout.first_ids, ids, side="right"))))
        order = rng.permutation(size, 0, "demo", 96, step)  # in a batch, lanes are neighbours
        gaps.append(np.abs(np.diff(ids[order].astype(np.float64))).mean())
    # None of `size` uniform draws hits a given shard with chance (1 - 1 / num_shards) ** size.
    # Two uniform draws from n samples are n / 3 apart in the mean.
    uniform_shards = num_shards * (1 - (1 - 1 / num_shards) ** size)
    return {
        "shards_in_a_batch": float(np.mean(shards)),
        "shards_in_a_uniform_batch": uniform_shards,
        "mean_gap_beside_uniform": float(np.mean(gaps)) / (layout.num_samples / 3),
    }


def order_of(index: Index, config: OrderBench) -> Mixture:
    """The order in which the ranks read the set."""
    return Mixture.make(
        [index.layout],
        [1.0],
        seed=0,
        global_batch=config.global_batch,
        window_samples=[WINDOW_CHUNKS * index.chunk_samples],
        stratified=config.chunk_order == "stratified",
    )


def _write_shard(config: OrderBench, count: int) -> str:
    """A tar of `count` samples: 32 JPEGs of about sample_bytes, repeated."""
    photos = [_jpeg(seed, config.sample_bytes) for seed in range(32)]
    path = config.folder / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in range(count):
            for extension, data in (("jpg", photos[sample % 32]), ("cls", b"1")):
                info = tarfile.TarInfo(f"{sample:07d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def _jpeg(seed: int, num_bytes: int) -> bytes:
    """A picture of 500 x 375 pixels, ImageNet's usual size, with noise up to num_bytes."""
    draws = rng.uniform(500 * 375 * 3, seed, "demo", 95).reshape(375, 500, 3)
    smooth = Image.fromarray((255 * draws).astype(np.uint8)).resize((125, 94)).resize((500, 375))
    low, high = 0.0, 1.0
    data = b""
    for _ in range(12):  # bisects the share of noise
        noise = (low + high) / 2
        pixels = (1 - noise) * np.asarray(smooth, dtype=np.float64) + noise * 255 * draws
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()
        low, high = (noise, high) if len(data) < num_bytes else (low, noise)
    return data


def _in_fresh_process(
    probe: Callable[[OrderBench], dict[str, float]], config: OrderBench
) -> dict[str, float]:
    """Run a probe of this module in a process in which nothing else has used memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(probe, config).result()
