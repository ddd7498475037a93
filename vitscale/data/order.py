"""Who reads what, and when: pure arithmetic on integers, with no process, file or state.

Epoch e permutes the chunks; cumulative counts give every sample a global position; the positions are cut into
V lanes; in a lane, windows of consecutive positions are shuffled. Step s of an epoch takes global_batch / V
samples from each lane, and the global batch is ordered by lane. So its content and order depend on (index,
seed, epoch, V, window, global_batch) only. Rank r owns a contiguous block of lanes, hence a contiguous slice
of every global batch, at any world size that divides V.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from vitscale import rng
from vitscale.config import ConfigError

MAX_DEFAULT_LANES = 1024
DIGEST_MASK = (1 << 53) - 1  # a JSON reader that keeps numbers as doubles still sees the exact integer


def default_lanes(global_batch: int) -> int:
    """The largest divisor of global_batch up to 1,024: as good as uniform shuffling from global_batch / 2
    lanes on.
    """
    return next(v for v in range(min(global_batch, MAX_DEFAULT_LANES), 0, -1) if global_batch % v == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one run over one index.

    chunk_counts: samples of each chunk, int64 [num_chunks]. Raises ConfigError if there are fewer samples
    than one batch.
    """

    chunk_counts: Int64[np.ndarray, " num_chunks"]
    seed: int
    global_batch: int
    lanes: int
    window_samples: int

    def __post_init__(self) -> None:
        if self.global_batch % self.lanes:
            raise ConfigError(
                f"global_batch {self.global_batch} is not a multiple of data.lanes {self.lanes}; use lanes = "
                f"{default_lanes(self.global_batch)}, or 0 to derive it"
            )
        if self.num_samples < self.global_batch:
            raise ConfigError(
                f"the data set has {self.num_samples:,} samples, fewer than one global_batch of "
                f"{self.global_batch:,}; lower global_batch"
            )

    @functools.cached_property
    def num_samples(self) -> int:
        return int(self.chunk_counts.sum())

    @property
    def per_lane(self) -> int:
        """Samples of one lane in one global batch."""
        return self.global_batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_samples // self.global_batch

    @property
    def tail(self) -> int:
        """Samples that an epoch leaves out (another subset each epoch): fewer than one global batch."""
        return self.num_samples % self.global_batch

    @functools.cached_property
    def chunk_first_ids(self) -> Int64[np.ndarray, " num_chunks"]:
        """Sample id (its number in index order) of each chunk's first sample."""
        return np.cumsum(self.chunk_counts) - self.chunk_counts

    def fingerprint(self, index_fingerprint: str) -> str:
        """Names this order: two runs with equal fingerprints read the same samples at the same steps."""
        parts = (index_fingerprint, self.seed, self.global_batch, self.lanes, self.window_samples)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def worlds(self) -> list[int]:
        """The world sizes that this run can be trained on: the divisors of the number of lanes."""
        return [w for w in range(1, self.lanes + 1) if self.lanes % w == 0]

    def rank_lanes(self, rank: int, world_size: int) -> range:
        """The lanes of one rank. Raises ConfigError for a world size that does not divide the lanes."""
        if self.lanes % world_size:
            raise ConfigError(
                f"{world_size} processes cannot share {self.lanes} lanes evenly; start one of "
                f"{', '.join(map(str, self.worlds()))}"
            )
        each = self.lanes // world_size
        return range(rank * each, (rank + 1) * each)

    def epoch(self, epoch: int) -> "EpochOrder":
        """The order of one epoch (from 0): draws the permutation of its chunks."""
        chunks = rng.permutation(len(self.chunk_counts), self.seed, "chunks", epoch)
        return EpochOrder(self, epoch, chunks, np.cumsum(self.chunk_counts[chunks]))

    def batch_ids(self, step: int, lanes: range) -> Int64[np.ndarray, " n"]:
        """Sample ids of `lanes` in the global batch of `step` (0-based, over all epochs), in batch order."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self.epoch(epoch)
        return np.concatenate([order.lane_ids(lane, step_in_epoch) for lane in lanes])


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """One epoch: chunk_order [num_chunks] and the cumulative sample counts in that order, chunk_ends
    [num_chunks].
    """

    order: Order
    epoch: int
    chunk_order: Int64[np.ndarray, " num_chunks"]
    chunk_ends: Int64[np.ndarray, " num_chunks"]

    def window_ids(self, lane: int, window: int) -> Int64[np.ndarray, " n"]:
        """Sample ids of one window of a lane, in reading order; the lane's last window may be shorter."""
        order = self.order
        lane_length = order.steps_per_epoch * order.per_lane
        first = window * order.window_samples
        count = min(order.window_samples, lane_length - first)
        positions = lane * lane_length + first + np.arange(count)
        chunk = np.searchsorted(self.chunk_ends, positions, side="right")
        chunk_id = self.chunk_order[chunk]
        within = positions - (self.chunk_ends[chunk] - order.chunk_counts[chunk_id])
        ids = order.chunk_first_ids[chunk_id] + within
        return ids[rng.permutation(count, order.seed, "window", self.epoch, lane, window)]

    def lane_ids(self, lane: int, step_in_epoch: int) -> Int64[np.ndarray, " n"]:
        """Sample ids that a lane gives to one step: per_lane of them."""
        size, per_lane = self.order.window_samples, self.order.per_lane
        first = step_in_epoch * per_lane
        windows = range(first // size, (first + per_lane - 1) // size + 1)
        ids = np.concatenate([self.window_ids(lane, w) for w in windows])
        start = first - windows.start * size
        return ids[start : start + per_lane]

    def lane_stream(self, lane: int, first_step: int) -> Iterator[tuple[int, Int64[np.ndarray, " n"]]]:
        """The windows of a lane from the one that `first_step` starts in: (offset to skip in it, its sample
        ids).
        """
        size = self.order.window_samples
        lane_length = self.order.steps_per_epoch * self.order.per_lane
        first = first_step * self.order.per_lane
        for window in range(first // size, -(-lane_length // size)):
            yield max(0, first - window * size), self.window_ids(lane, window)


def digest(ids: Int64[np.ndarray, " n"], first_position: int) -> int:
    """This slice's share of the batch digest: the shares of all ranks, added and masked, are `data/digest`.

    ids: the sample ids at positions first_position, first_position + 1, ... of the global batch. A sum of
    mixed words (splitmix64's finalizer), so that any partition of the batch gives the same total, and any
    swap another one.
    """
    positions = np.arange(first_position, first_position + len(ids), dtype=np.uint64)
    with np.errstate(over="ignore"):
        words = (ids.astype(np.uint64) << np.uint64(24)) + positions * np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words = words ^ (words >> np.uint64(31))
        return int(words.sum(dtype=np.uint64)) & DIGEST_MASK
