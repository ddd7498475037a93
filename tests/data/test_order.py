"""The order of one source is arithmetic: these tests start no process."""

import itertools

import numpy as np
import pytest

from vitscale import rng
from vitscale.data.id_set import IdSet
from vitscale.data.order import DIGEST_MASK, EpochOrder, Order, ShardLayout, digest

SHARDS = np.array([100, 37, 0, 260, 1, 599])


def make_order(
    lanes: int = 12,
    length: int | None = None,
    seed: int = 3,
    source: int = 0,
    window: int = 16,
    stratified: bool = False,
    held_out: np.ndarray = np.empty(0, dtype=np.int64),  # noqa: B008
) -> Order:
    layout = ShardLayout(SHARDS, 8, IdSet.of(held_out, 997))
    length = layout.num_drawn // lanes if length is None else length
    return Order(
        layout=layout,
        seed=seed,
        source=source,
        lanes=lanes,
        lane_length=length,
        window_samples=window,
        stratified=stratified,
    )


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    first = epoch * order.lane_length
    return np.stack([order.lane_ids(lane, first, order.lane_length) for lane in range(order.lanes)])


def test_a_layout_places_every_sample_in_its_chunk() -> None:
    layout = ShardLayout(SHARDS, 8)
    chunks = [
        range(first + n, first + min(n + 8, count))
        for first, count in zip(np.cumsum(SHARDS) - SHARDS, SHARDS, strict=False)
        for n in range(0, count, 8)
    ]
    assert layout.num_chunks == len(chunks) and layout.num_samples == 997
    for number, ids in enumerate(chunks):
        assert layout.chunk_ids(number) == ids
        assert set(layout.chunk_of(np.array(ids)).tolist()) == {number}
        assert 8 - layout.shortfalls[number] == len(ids)
    assert [layout.shard_of(n) for n in (0, 12, 13, 17, 18, 50, 51, 52)] == [0, 0, 1, 1, 3, 3, 4, 5]


def test_the_worked_examples_of_the_docstrings_hold() -> None:
    layout = ShardLayout(np.array([5, 3]), chunk_samples=2)
    assert [list(layout.chunk_ids(chunk)) for chunk in range(5)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert layout.first_ids.tolist() == [0, 5, 8] and layout.first_chunks.tolist() == [0, 3, 5]
    permuted = EpochOrder(layout, np.array([3, 0, 4, 2, 1], dtype=np.uint32), np.array([8]))
    assert permuted.sample_ids(range(8)).tolist() == [5, 6, 0, 1, 7, 4, 2, 3]
    assert permuted.sample_ids(range(3, 6)).tolist() == [1, 7, 4]
    some = ShardLayout(np.array([5, 3]), 2, IdSet.of(np.array([2, 5]), 8))
    assert some.drawn_ids(np.arange(some.num_drawn)).tolist() == [0, 1, 3, 4, 6, 7]
    permuted = EpochOrder(some, np.array([3, 0, 4, 2, 1], dtype=np.uint32), np.array([6]))
    assert permuted.sample_ids(range(6)).tolist() == [6, 0, 1, 7, 4, 3]
    order = Order(
        layout=ShardLayout(np.array([20]), 4), seed=0, source=0, lanes=2, lane_length=10, window_samples=4
    )
    lengths = [[len(window.ids) for window in itertools.islice(order.lane_stream(n, 0), 5)] for n in (0, 1)]
    assert lengths == [[4, 4, 2, 4, 4], [2, 4, 4, 2, 4]]
    second, entered = list(itertools.islice(order.lane_stream(0, 0), 2))[1], next(order.lane_stream(0, 5))
    assert entered.ids.tolist() == second.ids.tolist() and (second.skip, entered.skip) == (0, 1)
    layout = ShardLayout(np.array([48]), 4)
    order = Order(
        layout=layout, seed=47, source=0, lanes=2, lane_length=24, window_samples=8, stratified=True
    )
    assert rng.permutation(4, 47, "strata", 0).tolist() == [2, 0, 3, 1]
    assert order.epoch(0).chunks.tolist() == [5, 9, 3, 10, 4, 11, 2, 8, 0, 6, 1, 7]


@pytest.mark.parametrize("lanes", [1, 3, 12, 64, 997])
@pytest.mark.parametrize("window", [5, 16, 4096])
@pytest.mark.parametrize("stratified", [False, True])
def test_an_epoch_loses_only_the_tail_and_repeats_nothing(lanes: int, window: int, stratified: bool) -> None:
    order = make_order(lanes, window=window, stratified=stratified)
    for epoch in range(2):
        ids = epoch_ids(order, epoch).reshape(-1)
        assert len(np.unique(ids)) == len(ids) == 997 - order.tail
        assert ids.min() >= 0 and ids.max() < 997 and order.tail < lanes


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("lanes", [1, 12, 64])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_an_epoch_draws_each_sample_once_but_those_that_are_held_out(
    lanes: int, share: float, stratified: bool
) -> None:
    chosen = np.random.default_rng(0).random(997) < share
    chosen[96:137] = True  # whole chunks, and a whole shard
    held_out = np.flatnonzero(chosen)
    lanes = min(lanes, 997 - len(held_out))
    order = make_order(lanes, window=5, held_out=held_out, stratified=stratified)
    for epoch in range(2):
        ids = epoch_ids(order, epoch).reshape(-1).tolist()
        assert len(set(ids)) == len(ids) == 997 - len(held_out) - order.tail
        assert not set(ids) & set(held_out.tolist()) and order.tail < order.lanes
    whole = order.lane_ids(0, 0, 3 * order.lane_length)
    for first in (1, order.lane_length - 1, order.lane_length + 1):
        assert (
            order.lane_ids(0, first, order.lane_length).tolist()
            == whole[first:][: order.lane_length].tolist()
        )


@pytest.mark.parametrize("stratified", [False, True])
def test_the_tail_is_another_subset_in_another_epoch(stratified: bool) -> None:
    order = make_order(lanes=40, stratified=stratified)
    left_out = [set(range(997)) - set(epoch_ids(order, epoch).reshape(-1).tolist()) for epoch in range(2)]
    assert len(left_out[0]) == len(left_out[1]) == order.tail and left_out[0] != left_out[1]


@pytest.mark.parametrize("stratified", [False, True])
def test_a_lane_begins_at_any_draw_of_any_epoch(stratified: bool) -> None:
    order = make_order(stratified=stratified)
    for lane in range(12):
        whole = order.lane_ids(lane, 0, 3 * order.lane_length)
        for first in (0, 1, 15, 16, 17, order.lane_length - 1, order.lane_length, 2 * order.lane_length + 7):
            assert np.array_equal(order.lane_ids(lane, first, 40), whole[first : first + 40])


def test_windows_say_where_the_next_one_begins() -> None:
    """The samples after `last` in its chunk are the first ones of the lane's next window."""
    order = make_order(lanes=3)
    for window, following in itertools.pairwise(itertools.islice(order.lane_stream(1, 0), 10)):
        chunk = order.layout.chunk_ids(order.layout.chunk_with(window.last))
        assert set(range(window.last + 1, chunk.stop)) <= set(following.ids.tolist())
        assert window.last in window.ids


def test_lanes_read_at_different_steps() -> None:
    """Windows of different lanes end at different draws: no step reads for all of them."""
    order = make_order(lanes=8, window=16)
    first_windows = [len(next(order.lane_stream(lane, 0)).ids) for lane in range(8)]
    assert first_windows == [16, 14, 12, 10, 8, 6, 4, 2]


def test_epochs_seeds_and_sources_have_different_orders() -> None:
    orders = [epoch_ids(make_order(), 0), epoch_ids(make_order(), 1)]
    orders += [epoch_ids(make_order(seed=4), 0), epoch_ids(make_order(source=1), 0)]
    stratified = [make_order(stratified=True), make_order(source=1, stratified=True)]
    orders += [epoch_ids(order, epoch) for order in stratified for epoch in (0, 1)]
    assert not any(np.array_equal(first, second) for first, second in itertools.combinations(orders, 2))


def test_batches_mix_the_data_set_as_uniform_draws_would() -> None:
    """Mean absolute gap between neighbours in id, against the uniform expectation n / 3."""
    layout = ShardLayout(np.full(100, 100), 8)
    order = Order(layout=layout, seed=0, source=0, lanes=24, lane_length=416, window_samples=16)
    ids = epoch_ids(order, 0).T.astype(float)
    assert abs(np.abs(np.diff(ids, axis=1)).mean() / (10_000 / 3) - 1) < 0.05


def test_a_stratified_batch_has_as_much_from_everywhere() -> None:
    """Samples sorted by 10 classes, one from each of 40 lanes: about 4 of a class, always."""
    layout, spreads = ShardLayout(np.full(40, 100), 8), []
    for stratified in (False, True):
        order = Order(
            layout=layout,
            seed=0,
            source=0,
            lanes=40,
            lane_length=100,
            window_samples=16,
            stratified=stratified,
        )
        classes = epoch_ids(order, 1).T // 400  # [100, 40]
        counts = np.stack([np.bincount(batch, minlength=10) for batch in classes])
        spreads.append((counts.std(axis=0).mean(), counts[:50].sum(axis=0).std()))
    (shuffled, shuffled_over_50), (stratified_now, stratified_over_50) = spreads
    assert stratified_now < 0.8 * shuffled and stratified_over_50 < 0.5 * shuffled_over_50


def test_the_parts_of_a_lane_are_others_in_another_epoch() -> None:
    order = make_order(stratified=True)
    chunks = [set(order.layout.chunk_of(epoch_ids(order, epoch)[0]).tolist()) for epoch in range(8)]
    assert len(set.union(*chunks)) > 4 * max(map(len, chunks))


def test_the_order_of_a_seed_never_changes() -> None:
    """Golden values: a change here reorders every run in the world."""
    assert make_order().lane_ids(0, 0, 6).tolist() == [713, 716, 710, 717, 714, 371]
    assert make_order().lane_ids(5, 100, 6).tolist() == [767, 60, 63, 768, 766, 61]
    assert make_order(stratified=True).lane_ids(0, 0, 6).tolist() == [409, 412, 406, 413, 410, 560]
    assert make_order(stratified=True).lane_ids(5, 100, 6).tolist() == [62, 703, 706, 63, 61, 704]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 65, 1000])
def test_permutations_hold_every_number_once(n: int) -> None:
    drawn = rng.permutation(n, 1, "chunks", 0)
    assert sorted(drawn.tolist()) == list(range(n))
    assert n < 64 or not np.array_equal(drawn, rng.permutation(n, 2, "chunks", 0))


def test_permutations_are_uniform() -> None:
    """Each value is as often at each place: chi-square over 4,000 permutations of 8."""
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), rng.permutation(8, seed, "window", 0)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 49 + 5 * np.sqrt(98)  # 49 degrees of freedom


def test_the_digest_of_a_batch_never_changes() -> None:
    """Golden values: `data/digest` of older runs must stay comparable."""
    assert digest(np.array([7, 0, 302_999_999]), 0) == 5768792351212235
    assert digest(np.array([5]), 4095) == 8768673797076538


def test_the_digest_is_free_of_the_world_size_and_sees_every_swap() -> None:
    ids = epoch_ids(make_order(), 0)[:, :4].reshape(-1)
    whole = digest(ids, 0)
    for world_size in (2, 3, 4):
        parts = np.split(ids, world_size)
        total = sum(digest(part, r * len(part)) for r, part in enumerate(parts))
        assert total & DIGEST_MASK == whole
    swapped = ids.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert digest(swapped, 0) != whole
