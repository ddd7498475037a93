"""Batches over a grid of worlds, workers and sources: nothing lost, proportions as documented.

It is pure arithmetic: no process is started.
"""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from vitscale.data.data_config import SourceConfig
from vitscale.data.mixture import Mixture, default_lanes
from vitscale.data.order import ShardLayout
from vitscale.errors import ConfigError

LAYOUTS = [
    ShardLayout(np.array([300, 211, 97]), 8),
    ShardLayout(np.array([150, 41]), 4),
    ShardLayout(np.array([77]), 16),
]


def make_mixture(
    num_sources: int = 1,
    global_batch: int = 24,
    lanes: int = 12,
    repeats: int = 1,
    weights=(0.7, 0.2, 0.1),
    stratified: bool = False,
) -> Mixture:
    return Mixture.make(
        LAYOUTS[:num_sources],
        weights[:num_sources],
        seed=3,
        global_batch=global_batch,
        lanes=lanes,
        window_samples=[16, 8, 32][:num_sources],
        repeats=repeats,
        stratified=stratified,
    )


@pytest.mark.parametrize(
    ("world_size", "workers", "num_sources"),
    list(itertools.product([1, 2, 3, 4, 6, 12], [1, 2, 3], [1, 2, 3])),
)
def test_ranks_and_workers_join_to_the_same_global_batch(
    world_size: int, workers: int, num_sources: int
) -> None:
    mixture = make_mixture(num_sources)
    for step in (0, 7, 24, 25, 26, 100):
        parts = []
        for rank in range(world_size):
            lanes = mixture.rank_lanes(rank, world_size)
            for part in np.array_split(np.array(lanes), min(workers, len(lanes))):
                parts.append(mixture.batch_ids(step, range(part[0], part[-1] + 1)))
        assert np.array_equal(np.concatenate(parts), mixture.batch_ids(step, range(12)))


@pytest.mark.parametrize(("global_batch", "lanes"), [(24, 24), (24, 12), (24, 3), (24, 1), (5, 5), (64, 16)])
@pytest.mark.parametrize("stratified", [False, True])
def test_one_source_passes_through_whole_epochs(global_batch: int, lanes: int, stratified: bool) -> None:
    mixture = make_mixture(1, global_batch, lanes, stratified=stratified)
    steps = mixture.steps_per_epoch
    assert steps == 608 // global_batch and mixture.orders[0].tail == 608 % global_batch
    for epoch in range(2):
        ids = np.concatenate(
            [mixture.batch_ids(step, range(lanes)) for step in range(epoch * steps, (epoch + 1) * steps)]
        )
        assert len(np.unique(ids)) == len(ids) == steps * global_batch


@pytest.mark.parametrize("num_sources", [2, 3])
def test_every_source_has_its_own_epochs_in_which_nothing_is_lost_or_repeated(num_sources: int) -> None:
    mixture = make_mixture(num_sources)
    seen = [Counter() for _ in range(num_sources)]
    bounds = [*mixture.first_ids, sum(layout.num_samples for layout in LAYOUTS[:num_sources])]
    for step in range(120):
        for sample in mixture.batch_ids(step, range(12)).tolist():
            source = np.searchsorted(bounds, sample, side="right") - 1
            seen[source][sample] += 1
    for order, passes, times_seen in zip(mixture.orders, mixture.epochs(120), seen, strict=True):
        whole_passes = int(passes)
        # Lanes are within one draw of one another; an epoch leaves its tail out at most once.
        assert max(times_seen.values()) <= whole_passes + 1
        delivered = sum(min(times, whole_passes) for times in times_seen.values())
        missing = order.layout.num_samples * whole_passes - delivered
        assert missing <= order.tail * (whole_passes + 1) + 12


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_weight_must_be_a_share(weight: float) -> None:
    assert SourceConfig(index="a", weight=1e-3).weight == 1e-3
    with pytest.raises(ConfigError, match=f"the weight {weight} of a must be above 0 and finite"):
        SourceConfig(index="a", weight=weight)


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    assert make_mixture(2, weights=(1e-9, 1.0)).weights[0] > 0
    with pytest.raises(ConfigError, match="the weight 1e-12 is too small"):
        make_mixture(2, weights=(1e-12, 1.0))


def test_the_worked_example_of_the_docstring_holds() -> None:
    mixture = Mixture.make(
        [ShardLayout(np.array([300]), 4), ShardLayout(np.array([100]), 4)],
        [3.0, 1.0],
        seed=0,
        global_batch=4,
        lanes=4,
        window_samples=[8, 8],
    )
    table = ["".join("AB"[mixture.source_of(lane, draw)[0]] for draw in range(8)) for lane in range(4)]
    assert table == ["AABAAABA", "ABAAABAA", "BAAABAAA", "AAABAAAB"]
    assert mixture.source_of(1, 4) == (0, 3)
    assert [mixture.counts(0, draws)[0] for draws in range(5)] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 2.0), (0.999, 0.001), (1 / 3, 2 / 3)])
def test_proportions_of_two_sources_are_exact_at_every_step(weights: tuple[float, float]) -> None:
    """By Hermite's identity, the first source gives round(n share) of all n draws."""
    mixture = make_mixture(2, weights=weights)
    share = mixture.weights[0]
    for step in range(1, 300):
        draws = step * mixture.draws_per_step
        from_first = sum(mixture.counts(lane, draws)[0] for lane in range(12))
        assert from_first == int(12 * draws * share + Fraction(1, 2))


def test_proportions_of_three_sources_stay_within_two_draws() -> None:
    mixture = make_mixture(3)
    for step in range(1, 300):
        counts = np.sum([mixture.counts(lane, 2 * step) for lane in range(12)], axis=0)
        assert counts.sum() == 24 * step
        assert np.abs(counts - 24 * step * np.array([0.7, 0.2, 0.1])).max() <= 2


def test_of_three_sources_the_first_is_exact_and_the_others_vary_but_do_not_drift() -> None:
    """With one draw of 1,024 lanes a step; what docs/data.md says of it."""
    shares, large = np.array([0.5, 0.3, 0.2]), [ShardLayout(np.array([50_000]), 32)] * 3
    mixture = Mixture.make(
        large, shares.tolist(), seed=0, global_batch=1024, lanes=1024, window_samples=[64] * 3
    )
    totals = np.array([np.sum([mixture.counts(k, n) for k in range(1024)], axis=0) for n in range(31)])
    batches = np.diff(totals, axis=0)
    assert (batches[:, 0] == 512).all()
    assert 295 <= batches[:, 1].min() < 300 and 315 < batches[:, 1].max() <= 320
    assert (batches.std(0) < np.sqrt(1024 * shares * (1 - shares))).all()  # of random draws
    assert np.abs(totals - 1024 * np.arange(31)[:, None] * shares).max() < 13


def test_the_counters_and_the_choice_of_a_source_agree() -> None:
    mixture = make_mixture(3)
    for lane in range(12):
        counts = [0, 0, 0]
        for draw in range(200):
            assert mixture.counts(lane, draw) == counts
            source, drawn_before = mixture.source_of(lane, draw)
            assert drawn_before == counts[source]
            counts[source] += 1


def test_repeated_samples_are_in_one_batch_and_never_neighbours() -> None:
    mixture = make_mixture(global_batch=24, lanes=4, repeats=3)
    steps = [mixture.batch_ids(step, range(4)) for step in range(mixture.steps_per_epoch)]
    assert mixture.steps_per_epoch == 608 // 8
    for ids in steps:
        assert set(Counter(ids.tolist()).values()) == {3}
        assert not (ids[::2] == ids[1::2]).any()
    assert len(np.unique(np.concatenate(steps))) == 608


def test_fingerprints_tell_orders_apart() -> None:
    mixtures = [
        make_mixture(2),
        make_mixture(2, lanes=6),
        make_mixture(2, weights=(0.6, 0.4)),
        make_mixture(2, repeats=2),
        make_mixture(2, stratified=True),
    ]
    names = [mixture.fingerprint(["a", "b"]) for mixture in mixtures]
    names.append(make_mixture(2).fingerprint(["b", "a"]))
    assert len(set(names)) == 6 and make_mixture(2).fingerprint(["a", "b"]) == names[0]


def test_the_fingerprint_of_an_order_never_changes() -> None:
    """Golden value: with another one, no earlier run could continue."""
    assert make_mixture(2).fingerprint(["a", "b"]) == "676ca6a87b24f553a3acff0fa3a470b3"


def test_a_world_that_does_not_divide_is_refused_with_those_that_do() -> None:
    assert make_mixture().rank_lanes(2, 4) == range(6, 9)
    sentence = "5 processes cannot share 12 lanes evenly; start one of 1, 2, 3, 4, 6, 12"
    with pytest.raises(ConfigError, match=sentence):
        make_mixture().rank_lanes(0, 5)


def test_lanes_that_do_not_divide_the_batch_are_refused() -> None:
    assert make_mixture(lanes=8).per_lane == 3
    with pytest.raises(ConfigError, match=r"24 is not a multiple of data.lanes 7 .* use lanes = 24"):
        make_mixture(lanes=7)


def test_a_source_smaller_than_a_batch_is_refused() -> None:
    assert make_mixture(3, global_batch=77, lanes=7).orders[2].lane_length == 11
    with pytest.raises(ConfigError, match="77 samples to train on, fewer than one global_batch of 78"):
        make_mixture(3, global_batch=78, lanes=6)


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(1, 1), (100, 100), (4096, 1024), (4095, 819), (2 * 1031, 2)]
)
def test_default_lanes_divide_the_batch(global_batch: int, lanes: int) -> None:
    assert default_lanes(global_batch) == lanes and global_batch % lanes == 0


@pytest.mark.parametrize(
    ("global_batch", "repeats", "lanes"), [(24, 1, 24), (24, 2, 6), (24, 3, 4), (24, 8, 3), (24, 24, 1)]
)
def test_derived_lanes_draw_two_samples_a_step_where_they_are_repeated(
    global_batch: int, repeats: int, lanes: int
) -> None:
    mixture = make_mixture(global_batch=global_batch, lanes=0, repeats=repeats)
    assert mixture.lanes == lanes and mixture.draws_per_step == global_batch // repeats // lanes
