"""Who gives which sample to which place of every global batch: lanes of one source, or of several mixed by
weight. Pure arithmetic, like order.py.

The global batch is ordered by lane: each of the V lanes gives global_batch / V of it at every step, and
rank r
owns a contiguous block of lanes, hence a contiguous slice of the batch, at any world size that divides V.
In a
mixture, closed-form counters say which source a lane's n-th draw is from, and how many draws that source
has
given the lane before. Each source cuts its own epochs into V lanes, so that each passes through all of its
samples before it begins again.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from vitscale import rng
from vitscale.config import ConfigError
from vitscale.data.order import Layout, Order

MAX_DEFAULT_LANES = 1024


def default_lanes(global_batch: int) -> int:
    """The largest divisor of global_batch up to 1,024: as good as uniform shuffling from global_batch / 2
    lanes on.
    """
    return next(v for v in range(min(global_batch, MAX_DEFAULT_LANES), 0, -1) if global_batch % v == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The order of a run.

    weights: shares of the sources, adding up to 1. repeats: how often each drawn sample is used (repeated
    augmentation); a lane gives a step all of its draws once, then all of them again, so that neighbours,
    which
    mixup pairs, are different samples.
    """

    orders: tuple[Order, ...]
    weights: tuple[Fraction, ...]
    seed: int
    global_batch: int
    lanes: int
    repeats: int

    @classmethod
    def make(
        cls,
        layouts: Sequence[Layout],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        lanes: int = 0,
        window_samples: Sequence[int],
        repeats: int = 1,
    ) -> "Mixture":
        """Cut the sources into lanes (0 = default_lanes). Raises ConfigError where the numbers do not fit."""
        distinct = global_batch // repeats
        # Two draws of a lane, at least, where samples are repeated: each is the other's neighbour.
        derived = default_lanes(max(1, distinct // 2 if repeats > 1 and distinct % 2 == 0 else distinct))
        lanes = lanes or derived
        if global_batch % repeats or distinct % lanes:
            raise ConfigError(
                f"global_batch {global_batch} is not a multiple of data.lanes {lanes} x augment.repeats "
                f"{repeats}; use lanes = {derived} (or 0 to derive it), and a multiple of the repeats"
            )
        few = min(layout.num_samples for layout in layouts)
        if few < distinct:
            raise ConfigError(
                f"the data set has {few:,} samples, fewer than one global_batch of {distinct:,}; lower "
                "global_batch"
            )
        # One source ends its epochs with a whole batch, so that steps_per_epoch is a whole number.
        alone = len(layouts) == 1
        lengths = [
            layout.num_samples // distinct * (distinct // lanes) if alone else layout.num_samples // lanes
            for layout in layouts
        ]
        orders = tuple(
            Order(layout=layout, seed=seed, source=n, lanes=lanes, lane_length=length, window_samples=window)
            for n, (layout, length, window) in enumerate(zip(layouts, lengths, window_samples, strict=True))
        )
        shares = [Fraction(weight).limit_denominator(10**9) for weight in weights]
        if not all(shares):
            raise ConfigError(f"data.sources: the weight {min(weights)} is too small; use larger ones")
        return cls(
            orders=orders,
            weights=tuple(share / sum(shares) for share in shares),
            seed=seed,
            global_batch=global_batch,
            lanes=lanes,
            repeats=repeats,
        )

    @property
    def per_lane(self) -> int:
        """Places of one lane in one global batch."""
        return self.global_batch // self.lanes

    @property
    def draws_per_step(self) -> int:
        """Draws of one lane in one step: each fills `repeats` places."""
        return self.per_lane // self.repeats

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass through the first source; of a mixture, rounded up."""
        return math.ceil(Fraction(self.orders[0].lane_length, self.draws_per_step) / self.weights[0])

    def epochs(self, step: int) -> list[float]:
        """How often each source has been passed through when `step` steps are done."""
        draws = step * self.draws_per_step
        return [draws * float(w) / o.lane_length for o, w in zip(self.orders, self.weights, strict=True)]

    @functools.cached_property
    def first_ids(self) -> list[int]:
        """What is added to each source's sample ids to number the samples of all sources."""
        sizes = [order.layout.num_samples for order in self.orders]
        return [sum(sizes[:number]) for number in range(len(sizes))]

    def fingerprint(self, index_fingerprints: Sequence[str]) -> str:
        """Names this order: two runs with equal fingerprints read the same samples at the same steps."""
        shape = (self.seed, self.global_batch, self.lanes, self.repeats, *map(str, self.weights))
        parts = (*index_fingerprints, *shape, *(order.window_samples for order in self.orders))
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

    def source_of(self, lane: int, draw: int) -> tuple[int, int]:
        """Which source a lane's draw (0-based, over the whole run) is from, and how many draws from that
        source came before it in this lane.

        Each source but the last takes its share of what those before it left: floor(n share + phase) of n
        draws. The phases of the V lanes are a permutation of (i + 1/2) / V, so that by Hermite's identity
        the
        first source's draws of all lanes add up to round(V n share): exact at every step, not on average.
        """
        rest = draw
        for level in range(len(self.orders) - 1):
            before, after = (self._taken(level, lane, n) for n in (rest, rest + 1))
            if after > before:
                return level, before
            rest -= before
        return len(self.orders) - 1, rest

    def counts(self, lane: int, draws: int) -> list[int]:
        """How many of a lane's first `draws` draws each source has given."""
        counts, rest = [], draws
        for level in range(len(self.orders) - 1):
            counts.append(self._taken(level, lane, rest))
            rest -= counts[-1]
        return [*counts, rest]

    def draw_epochs(self, step: int) -> None:
        """Draw the permutations that a step needs, for processes that will be forked to share them."""
        for passes, order in zip(self.epochs(step), self.orders, strict=True):
            order.epoch(int(passes))

    def batch_ids(self, step: int, lanes: range) -> Int64[np.ndarray, " n"]:
        """Global sample ids of `lanes` in the global batch of `step` (0-based), in batch order."""
        return np.concatenate([self._lane_ids(lane, step) for lane in lanes])

    def _lane_ids(self, lane: int, step: int) -> Int64[np.ndarray, " n"]:
        first = step * self.draws_per_step
        picks = [self.source_of(lane, first + i) for i in range(self.draws_per_step)]
        ids = np.empty(self.draws_per_step, dtype=np.int64)
        for number, order in enumerate(self.orders):
            places = [place for place, (source, _) in enumerate(picks) if source == number]
            if places:
                drawn = order.lane_ids(lane, picks[places[0]][1], len(places))
                ids[places] = drawn + self.first_ids[number]
        return np.tile(ids, self.repeats)

    def _taken(self, level: int, lane: int, draws: int) -> int:
        """How many of `draws` that reach source `level` it takes, in whole numbers."""
        share, phase = self._shares[level], 2 * int(self._phases[level][lane]) + 1
        scale = 2 * self.lanes * share.denominator
        return (draws * share.numerator * 2 * self.lanes + phase * share.denominator) // scale

    @functools.cached_property
    def _shares(self) -> list[Fraction]:
        """Each source's share of what the sources before it leave."""
        return [weight / sum(self.weights[level:]) for level, weight in enumerate(self.weights)]

    @functools.cached_property
    def _phases(self) -> list[Int64[np.ndarray, " lanes"]]:
        return [rng.permutation(self.lanes, self.seed, "mix", n) for n in range(len(self.orders))]
