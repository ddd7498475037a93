"""Which sample fills which place of each global batch: lanes of one source, or of several mixed
by weight. Pure arithmetic, like order.py.

The global batch is ordered by lane: each of the V lanes gives global_batch / V of it at every
step. Rank r owns a contiguous block of lanes, hence a contiguous slice of the batch, at any
world size that divides V. In a mixture, closed-form counters say which source a lane's n-th
draw comes from, and how many draws of that source the lane has had before. Each source cuts its
own epochs into V lanes, so that each passes through all of its samples before it starts over.
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
from vitscale.data.order import Order, ShardLayout
from vitscale.errors import ConfigError

MAX_DEFAULT_LANES = 1024


def default_lanes(global_batch: int) -> int:
    """The largest divisor of global_batch up to 1,024.

    From global_batch / 2 lanes on, shuffling is as good as uniform.
    """
    candidates = range(min(global_batch, MAX_DEFAULT_LANES), 0, -1)
    return next(lanes for lanes in candidates if global_batch % lanes == 0)


def check_repeats(global_batch: int, repeats: int) -> None:
    """Raise ConfigError unless a global batch has whole samples. repeats: augment.repeats."""
    if global_batch % repeats:
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of augment.repeats {repeats}; "
            f"use {max(1, global_batch // repeats) * repeats}"
        )


def lanes_of(global_batch: int, lanes: int, repeats: int) -> int:
    """The lanes of a run. lanes: data.lanes, 0 to derive them. repeats: augment.repeats.

    Raises ConfigError if they do not divide what a step draws.
    """
    check_repeats(global_batch, repeats)
    distinct = global_batch // repeats
    # Where samples are repeated, a lane draws two or more in a step if it can: a single one
    # would be its own neighbour.
    derived = default_lanes(max(1, distinct // 2 if repeats > 1 and distinct % 2 == 0 else distinct))
    lanes = lanes or derived
    if distinct % lanes:
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of data.lanes {lanes} x augment.repeats "
            f"{repeats}; use lanes = {derived} (or 0 to derive it)"
        )
    return lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The order of a run.

    weights: shares of the sources, adding up to 1. repeats: how often each drawn sample is used
    (repeated augmentation). A lane gives a step all of its draws once, then all of them again,
    so that neighbours, which mixup pairs, are different samples.
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
        layouts: Sequence[ShardLayout],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        lanes: int = 0,
        window_samples: Sequence[int],
        repeats: int = 1,
        stratified: bool = False,
    ) -> "Mixture":
        """Cut the sources into lanes (0 = derive them, as lanes_of does).

        Raises ConfigError if the numbers do not fit.
        """
        lanes, distinct = lanes_of(global_batch, lanes, repeats), global_batch // repeats
        smallest = min(layout.num_drawn for layout in layouts)
        if not smallest:
            raise ConfigError(
                "the data set has no samples to train on: all are left out by data.exclude, "
                "data.validation_fraction or data.fraction; change that"
            )
        if smallest < distinct:
            fitting = 2 ** (smallest.bit_length() - 1) * repeats
            raise ConfigError(
                f"the data set has {smallest:,} samples to train on, fewer than one global_batch of "
                f"{distinct:,}; lower global_batch, to {fitting:,} for example"
            )
        # A single source ends its epochs with a whole batch: steps_per_epoch is a whole number.
        single = len(layouts) == 1
        lengths = [
            layout.num_drawn // distinct * (distinct // lanes) if single else layout.num_drawn // lanes
            for layout in layouts
        ]
        orders = tuple(
            Order(
                layout=layout,
                seed=seed,
                source=n,
                lanes=lanes,
                lane_length=length,
                window_samples=window,
                stratified=stratified,
            )
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
        """Steps of one pass through the first source; in a mixture, rounded up."""
        return math.ceil(Fraction(self.orders[0].lane_length, self.draws_per_step) / self.weights[0])

    def epochs(self, step: int) -> list[float]:
        """How often each source has been passed through after `step` steps."""
        draws = step * self.draws_per_step
        return [
            draws * float(weight) / order.lane_length
            for order, weight in zip(self.orders, self.weights, strict=True)
        ]

    @functools.cached_property
    def first_ids(self) -> list[int]:
        """What to add to each source's sample ids to number the samples through all sources."""
        sizes = [order.layout.num_samples for order in self.orders]
        return [sum(sizes[:source]) for source in range(len(sizes))]

    def fingerprint(self, index_fingerprints: Sequence[str]) -> str:
        """Names this order: runs with equal fingerprints read equal samples at equal steps."""
        shape = (self.seed, self.global_batch, self.lanes, self.repeats, *map(str, self.weights))
        parts = (*index_fingerprints, *shape, *(order.window_samples for order in self.orders))
        if self.orders[0].stratified:
            parts += ("stratified",)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def worlds(self) -> list[int]:
        """The world sizes that can train this run: the divisors of the number of lanes."""
        return [world for world in range(1, self.lanes + 1) if self.lanes % world == 0]

    def rank_lanes(self, rank: int, world_size: int) -> range:
        """The lanes of one rank.

        Raises ConfigError for a world size that does not divide the number of lanes.
        """
        if self.lanes % world_size:
            raise ConfigError(
                f"{world_size} processes cannot share {self.lanes} lanes evenly; start one of "
                f"{', '.join(map(str, self.worlds()))}"
            )
        per_rank = self.lanes // world_size
        return range(rank * per_rank, (rank + 1) * per_rank)

    def source_of(self, lane: int, draw: int) -> tuple[int, int]:
        """The source of a lane's draw, and how many draws of it the lane has had before.

        draw: 0-based, over the whole run. Of n draws, the first source takes

            floor(n share + phase),    phase = (i + 1/2) / V,

        where i is the lane's place in a permutation of the V lanes. The next source then takes
        its share of the rest in the same way, and the last one takes what remains. By Hermite's
        identity the first source's draws in all lanes add up to round(V n share): exact at each
        step, not only on average. Of later sources, whose rest differs by lane, the sums are so
        on average only. For two sources A and B at 3:1, 4 lanes and seed 0:

            lane  phase   draw 0 1 2 3 4 5 6 7
              0    5/8         A A B A A A B A
              1    3/8         A B A A A B A A     source_of(1, 4) is (0, 3):
              2    1/8         B A A A B A A A     A, drawn 3 times before
              3    7/8         A A A B A A A B
                 A in all      3 3 3 3 3 3 3 3
        """
        rest = draw
        for level in range(len(self.orders) - 1):
            before, after = self._taken(level, lane, rest), self._taken(level, lane, rest + 1)
            if after > before:
                return level, before
            rest -= before
        return len(self.orders) - 1, rest

    def counts(self, lane: int, draws: int) -> list[int]:
        """How many of a lane's first `draws` draws each source gives."""
        counts, rest = [], draws
        for level in range(len(self.orders) - 1):
            counts.append(self._taken(level, lane, rest))
            rest -= counts[-1]
        return [*counts, rest]

    def draw_epochs(self, step: int) -> None:
        """Draw the permutations that a step needs, so that forked processes share them."""
        for passes, order in zip(self.epochs(step), self.orders, strict=True):
            order.epoch(int(passes))

    def batch_ids(self, step: int, lanes: range) -> Int64[np.ndarray, " n"]:
        """The samples that `lanes` give to a step (0-based), in batch order.

        The ids are numbered through all sources.
        """
        return np.concatenate([self._lane_ids(lane, step) for lane in lanes])

    def _lane_ids(self, lane: int, step: int) -> Int64[np.ndarray, " per_lane"]:
        first = step * self.draws_per_step
        draws = [self.source_of(lane, first + place) for place in range(self.draws_per_step)]
        ids = np.empty(self.draws_per_step, dtype=np.int64)  # [draws_per_step]
        for number, order in enumerate(self.orders):
            places = [place for place, (source, _) in enumerate(draws) if source == number]
            if places:
                _, drawn_before = draws[places[0]]
                ids[places] = order.lane_ids(lane, drawn_before, len(places)) + self.first_ids[number]
        return np.tile(ids, self.repeats)  # [per_lane]

    def _taken(self, level: int, lane: int, draws: int) -> int:
        """How many draws source `level` takes of the `draws` that the sources before it left.

        floor(draws share + (i + 1/2) / V) in whole numbers. In lane 0 of the table above, where
        share = 3/4, i = 2 and V = 4: floor((24 draws + 20) / 32), 0 1 2 2 3 for 0 to 4 draws.
        """
        share, twice_phase = self._shares[level], 2 * int(self._phases[level][lane]) + 1
        scale = 2 * self.lanes * share.denominator
        return (draws * share.numerator * 2 * self.lanes + twice_phase * share.denominator) // scale

    @functools.cached_property
    def _shares(self) -> list[Fraction]:
        """Each source's share of what the sources before it leave."""
        return [weight / sum(self.weights[level:]) for level, weight in enumerate(self.weights)]

    @functools.cached_property
    def _phases(self) -> list[Int64[np.ndarray, " lanes"]]:
        """Each source's permutation of the lanes: i of every lane."""
        return [rng.permutation(self.lanes, self.seed, "mix", n) for n in range(len(self.orders))]
