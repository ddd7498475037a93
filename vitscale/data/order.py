"""The order of one source: pure arithmetic on integers, with no process, file or state.

Each epoch permutes the chunks. Cumulative counts then give every sample a position, the
positions are cut into V lanes, and windows of consecutive positions of a lane are shuffled. So
what a lane gives at its n-th draw depends only on (layout, seed, source, V, lane_length,
window, stratified). Finding it takes no walk over the draws before it: the state of a reader
is n.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from vitscale import rng
from vitscale.data.id_set import NO_IDS, IdSet

DIGEST_MASK = (1 << 53) - 1  # a JSON reader that keeps numbers as doubles still sees the exact integer
_BLOCK = 64  # chunks whose samples are counted together: the counts of 9.5 million chunks take 1.2 MB
_COUNTED_CHUNKS = 1 << 20  # at a time, so that counting takes no memory
_KEPT_EPOCHS = 2  # lanes pass from one epoch to the next within a few steps of one another


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """How a set of shards is cut into chunks.

    shard_samples: the number of samples in each shard. A shard is cut into chunks of
    `chunk_samples`, the last of which may be shorter. Samples and chunks are numbered through
    the shards:

        ShardLayout([5, 3], chunk_samples=2)
        sample ids  0 1 | 2 3 | 4 || 5 6 | 7        first_ids     0 5 8
        chunk        0     1    2     3    4        first_chunks  0 3 5

    held_out: samples that have their places in the chunks and that no epoch draws. The others
    are numbered on, by rank. With 2 and 5 held out:

        sample ids  0 1 |   3 | 4 ||   6 | 7
        rank        0 1     2   3      4   5        num_drawn     6
    """

    shard_samples: Int64[np.ndarray, " num_shards"]
    chunk_samples: int
    held_out: IdSet = NO_IDS

    @functools.cached_property
    def first_ids(self) -> Int64[np.ndarray, " num_shards_and_end"]:
        """Each shard's first sample id, and the number of all samples at the end."""
        return np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    @functools.cached_property
    def first_chunks(self) -> Int64[np.ndarray, " num_shards_and_end"]:
        """Each shard's first chunk, and the number of all chunks at the end."""
        return np.concatenate([[0], np.cumsum(-(-self.shard_samples // self.chunk_samples))]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.first_ids[-1])

    @property
    def num_drawn(self) -> int:
        """How many samples an epoch can draw."""
        return self.num_samples - len(self.held_out)

    @property
    def num_chunks(self) -> int:
        return int(self.first_chunks[-1])

    def chunk_of(self, ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The chunk that holds each sample."""
        shards = np.searchsorted(self.first_ids, ids, side="right") - 1  # [n]
        return self.first_chunks[shards] + (ids - self.first_ids[shards]) // self.chunk_samples

    def chunk_with(self, sample_id: int) -> int:
        """The chunk that holds one sample."""
        return int(self.chunk_of(np.array([sample_id]))[0])

    def shard_of(self, chunk: int) -> int:
        """The shard that holds a chunk."""
        return int(np.searchsorted(self.first_chunks, chunk, side="right")) - 1

    def chunk_ids(self, chunk: int) -> range:
        """The sample ids of a chunk."""
        first_ids, counts = self.spans(np.array([chunk]))
        return range(int(first_ids[0]), int(first_ids[0] + counts[0]))

    def spans(
        self, chunks: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """First sample id and number of samples of each chunk."""
        shards = np.searchsorted(self.first_chunks, chunks, side="right") - 1  # [n]
        skipped = (chunks - self.first_chunks[shards]) * self.chunk_samples  # within the shard
        counts = np.minimum(self.chunk_samples, self.shard_samples[shards] - skipped)
        return self.first_ids[shards] + skipped, counts

    def drawn_spans(
        self, chunks: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """As spans, of what epochs draw: each chunk's first rank, and how many it has."""
        first_ids, counts = self.spans(chunks)
        if not self.held_out:
            return first_ids, counts
        before, until = (self.held_out.count_below(ids) for ids in (first_ids, first_ids + counts))
        return first_ids - before, counts - (until - before)

    def drawn_ids(self, ranks: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The samples of ranks."""
        return self.held_out.absent(ranks) if self.held_out else ranks

    @functools.cached_property
    def shortfalls(self) -> UInt16[np.ndarray, " num_chunks"]:
        """How many samples to draw each chunk lacks to a full one.

        0 except for the last of a shard, and for chunks with samples that are held out.
        """
        shortfalls = np.zeros(self.num_chunks, dtype=np.uint16)
        filled = self.shard_samples > 0  # [num_shards]; an empty shard has no last chunk
        shortfalls[self.first_chunks[1:][filled] - 1] = -self.shard_samples[filled] % self.chunk_samples
        for start in range(0, self.num_chunks if self.held_out else 0, _COUNTED_CHUNKS):
            chunks = np.arange(start, min(start + _COUNTED_CHUNKS, self.num_chunks))
            shortfalls[chunks] += (self.spans(chunks)[1] - self.drawn_spans(chunks)[1]).astype(np.uint16)
        return shortfalls


class Window(NamedTuple):
    """Consecutive draws of a lane, all in one epoch: sample ids in drawing order.

    skip: how many of its draws are past already, where a lane is entered inside a window.
    last: the sample at the window's last position, before the shuffle. If its chunk has a
    sample after it, that is where the lane's next window begins.
    """

    epoch: int
    skip: int
    ids: Int64[np.ndarray, " n"]
    last: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What each lane of one source draws.

    source: its number in a mixture, so that sources under one seed have different orders.
    lane_length: draws of a lane in an epoch. An epoch uses lanes x lane_length of the samples,
    each epoch another subset.
    stratified: whether a lane's chunks of an epoch come from a few parts of the data set, or
    from anywhere in it.
    """

    layout: ShardLayout
    seed: int
    source: int
    lanes: int
    lane_length: int
    window_samples: int
    stratified: bool = False
    _epochs: dict[int, "EpochOrder"] = dataclasses.field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    @property
    def tail(self) -> int:
        """How many of the samples that it can draw an epoch leaves out."""
        return self.layout.num_drawn - self.lanes * self.lane_length

    def epoch(self, epoch: int) -> "EpochOrder":
        """The order of one epoch (from 0); the last two are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = EpochOrder.draw(self, epoch)
        return self._epochs[epoch]

    def lane_stream(self, lane: int, first_draw: int) -> Iterator[Window]:
        """The windows of a lane, without end, from the one that holds `first_draw`.

        Draws count from 0 over all epochs. The windows of different lanes end at different
        draws, so that reading is spread evenly over the steps. For 2 lanes, lane_length 10 and
        window_samples 4:

            lane 0, shift 0:  draws 0-3 | 4-7 | 8-9 || 10-13 | 14-17 | ...
            lane 1, shift 2:  draws 0-1 | 2-5 | 6-9 || 10-11 | 12-15 | ...

        lane_stream(0, 5) begins with the window of draws 4-7 and skip = 1. A window ends with
        its epoch (||) at the latest.
        """
        size, shift = self.window_samples, lane * self.window_samples // self.lanes
        epoch, first = divmod(first_draw, self.lane_length)
        while True:
            for window in range((first + shift) // size, -(-(self.lane_length + shift) // size)):
                start = max(0, window * size - shift)
                stop = min(self.lane_length, (window + 1) * size - shift)
                positions = range(lane * self.lane_length + start, lane * self.lane_length + stop)
                ids = self.epoch(epoch).sample_ids(positions)  # [stop - start]
                shuffle = rng.permutation(len(ids), self.seed, "window", self._key(epoch), lane, window)
                yield Window(epoch, max(0, first - start), ids[shuffle], int(ids[-1]))
            epoch, first = epoch + 1, 0

    def lane_ids(self, lane: int, first_draw: int, count: int) -> Int64[np.ndarray, " count"]:
        """Sample ids of `count` draws of a lane."""
        parts, missing = [np.empty(0, dtype=np.int64)], count
        for window in self.lane_stream(lane, first_draw):
            if not missing:
                break
            parts.append(window.ids[window.skip : window.skip + missing])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def _key(self, epoch: int) -> int:
        """Epoch and source as one id: a stream takes three, and windows need two more."""
        return epoch | self.source << 32


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """One epoch's permutation of the chunks.

    block_ends: the number of samples up to the end of each block of 64 permuted chunks. A
    search in these and a count within one block find a position: no sum per chunk is stored.
    """

    layout: ShardLayout
    chunks: UInt32[np.ndarray, " num_chunks"]
    block_ends: Int64[np.ndarray, " num_blocks"]

    @classmethod
    def draw(cls, order: Order, epoch: int) -> "EpochOrder":
        """Permute the chunks of an epoch (from 0)."""
        layout = order.layout
        chunks = rng.permutation(layout.num_chunks, order.seed, "chunks", order._key(epoch))
        chunks = chunks.astype(np.uint32)
        if order.stratified:
            chunks = _stratified(order, epoch, chunks)
        starts = np.arange(0, len(chunks), _BLOCK)  # [num_blocks]
        missing = np.add.reduceat(layout.shortfalls[chunks], starts, dtype=np.int64)
        full = np.diff(np.append(starts, len(chunks))) * layout.chunk_samples
        return cls(layout, chunks, np.cumsum(full - missing))

    def sample_ids(self, positions: range) -> Int64[np.ndarray, " n"]:
        """The samples at n consecutive positions of the epoch.

        With ShardLayout([5, 3], chunk_samples=2), if the chunks are permuted to 3 0 4 2 1:

            position   0 1 | 2 3 | 4 | 5 | 6 7
            chunk       3     0    4   2    1
            sample id  5 6 | 0 1 | 7 | 4 | 2 3        sample_ids(range(3, 6)) is 1 7 4

        With 2 and 5 held out it is 6 | 0 1 | 7 | 4 | 3, and sample_ids(range(3, 6)) is 7 4 3.
        """
        first, last = np.searchsorted(self.block_ends, [positions.start, positions.stop - 1], side="right")
        chunks = self.chunks[first * _BLOCK : (last + 1) * _BLOCK].astype(np.int64)  # [c]
        first_ranks, counts = self.layout.drawn_spans(chunks)  # [c] each
        ends = np.cumsum(counts) + (self.block_ends[first - 1] if first else 0)  # [c]
        wanted = np.arange(positions.start, positions.stop)  # [n]
        places = np.searchsorted(ends, wanted, side="right")  # [n], places in `chunks`
        return self.layout.drawn_ids(first_ranks[places] + wanted - (ends[places] - counts[places]))


def _stratified(
    order: Order, epoch: int, chunks: UInt32[np.ndarray, " num_chunks"]
) -> UInt32[np.ndarray, " num_chunks"]:
    """Permuted chunks, so ordered that each lane has its own parts of the data set in an epoch.

    The data set is cut into strata of consecutive chunks, as many for each lane as there are
    chunks in its window. Which strata a lane has is drawn, and it takes a chunk from each of
    them in turn. So every global batch takes as much from each part of the data set as from any
    other, however the samples are sorted. For 2 lanes and windows of 2 chunks, if the strata
    are permuted to 2 0 3 1:

        chunk      0 1 2 | 3 4 5 | 6 7 8 | 9 10 11        lane 0    5 9 | 3 10 | 4 11
        stratum      2   |   0   |   3   |    1           lane 1    2 8 | 0  6 | 1  7
    """
    layout, per_lane = order.layout, max(1, order.window_samples // order.layout.chunk_samples)
    num_strata = order.lanes * per_lane
    ends = np.arange(num_strata + 1) * order.lane_length // per_lane * len(chunks) // layout.num_drawn
    ends[-1] = len(chunks)  # the last one has the tail
    sizes = np.diff(ends)  # [num_strata]
    strata = rng.permutation(num_strata, order.seed, "strata", order._key(epoch))
    # Small numbers are sorted by radix, in linear time.
    stratum = np.repeat(strata.astype(np.min_scalar_type(num_strata)), sizes[strata])  # [num_chunks]
    by_stratum = chunks[np.argsort(stratum[chunks], kind="stable")]
    turns = np.arange(len(chunks), dtype=np.uint32) - np.repeat(ends[:-1].astype(np.uint32), sizes)
    lanes = np.repeat((np.arange(num_strata) // per_lane).astype(np.uint32), sizes)
    return by_stratum[np.lexsort((turns, lanes))]


def digest(ids: Int64[np.ndarray, " n"], first_position: int) -> int:
    """A slice's share of the batch digest: all shares, added and masked, are `data/digest`.

    ids: the sample ids at positions first_position, first_position + 1, ... of the global
    batch. Each (id, position) is mixed to a word (splitmix64's finalizer), and the words are
    added: every partition of the batch gives the same total, and any swap another one.
    """
    positions = np.arange(first_position, first_position + len(ids), dtype=np.uint64)  # [n]
    with np.errstate(over="ignore"):
        words = (ids.astype(np.uint64) << np.uint64(24)) + positions * np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words = words ^ (words >> np.uint64(31))
        return int(words.sum(dtype=np.uint64)) & DIGEST_MASK
