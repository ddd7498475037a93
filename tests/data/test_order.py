"""The order is arithmetic: these tests walk grids of worlds and start no process."""

import numpy as np
import pytest

from vitscale.config import ConfigError
from vitscale.data.order import DIGEST_MASK, Order, default_lanes, digest


def make_order(global_batch: int = 24, lanes: int = 12, samples: int = 997, seed: int = 3) -> Order:
    full, rest = divmod(samples, 8)
    return Order(
        chunk_counts=np.array([8] * full + [rest]),
        seed=seed,
        global_batch=global_batch,
        lanes=lanes,
        window_samples=16,
    )


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.stack([order.batch_ids(step, range(order.lanes)) for step in steps])


@pytest.mark.parametrize(("global_batch", "lanes"), [(24, 24), (24, 12), (24, 3), (24, 1), (5, 5), (64, 16)])
def test_an_epoch_loses_only_the_tail_and_repeats_nothing(global_batch: int, lanes: int) -> None:
    order = make_order(global_batch, lanes)
    ids = epoch_ids(order, 0).reshape(-1)
    assert len(np.unique(ids)) == len(ids) == order.num_samples - order.tail
    assert ids.min() >= 0 and ids.max() < order.num_samples


def test_the_tail_is_another_subset_in_another_epoch() -> None:
    order = make_order()
    left_out = [
        set(range(order.num_samples)) - set(epoch_ids(order, e).reshape(-1).tolist()) for e in range(2)
    ]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_join_to_the_same_global_batch_at_any_world_size(world_size: int) -> None:
    order = make_order()
    for step in (0, 7, order.steps_per_epoch - 1, order.steps_per_epoch, 3 * order.steps_per_epoch + 5):
        joined = np.concatenate(
            [order.batch_ids(step, order.rank_lanes(r, world_size)) for r in range(world_size)]
        )
        assert np.array_equal(joined, order.batch_ids(step, range(order.lanes)))


def test_lane_streams_give_the_ids_of_the_steps_they_begin_at() -> None:
    order = make_order()
    epoch = order.epoch(1)
    for lane in range(order.lanes):
        for first in (0, 1, 9, order.steps_per_epoch - 1):
            streamed = np.concatenate([ids[skip:] for skip, ids in epoch.lane_stream(lane, first)])
            stepped = np.concatenate(
                [epoch.lane_ids(lane, step) for step in range(first, order.steps_per_epoch)]
            )
            assert np.array_equal(streamed, stepped)


def test_epochs_and_seeds_have_different_orders() -> None:
    order = make_order()
    assert not np.array_equal(epoch_ids(order, 0), epoch_ids(order, 1))
    assert not np.array_equal(epoch_ids(order, 0), epoch_ids(make_order(seed=4), 0))


def test_batches_mix_the_data_set_as_uniform_draws_would() -> None:
    """Mean absolute gap between neighbours in id, against the uniform expectation n / 3."""
    order = make_order(global_batch=24, lanes=24, samples=10_000)
    ids = epoch_ids(order, 0).astype(float)
    assert abs(np.abs(np.diff(ids, axis=1)).mean() / (10_000 / 3) - 1) < 0.05


def test_the_order_of_a_seed_never_changes() -> None:
    """Golden values: a change here reorders every run in the world."""
    assert make_order().batch_ids(0, range(3)).tolist() == [731, 734, 742, 63, 903, 801]
    assert make_order().batch_ids(100, range(3)).tolist() == [62, 60, 103, 410, 193, 192]


def test_the_digest_is_free_of_the_world_size_and_sees_every_swap() -> None:
    ids = make_order().batch_ids(5, range(12))
    whole = digest(ids, 0)
    for world_size in (2, 3, 4):
        parts = np.split(ids, world_size)
        total = sum(digest(part, r * len(part)) for r, part in enumerate(parts))
        assert total & DIGEST_MASK == whole
    swapped = ids.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert digest(swapped, 0) != whole


def test_a_world_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match="5 processes cannot share 12 lanes evenly; start one of 1, 2, 3, 4, 6, 12"
    ):
        make_order().rank_lanes(0, 5)


def test_lanes_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch 24 is not a multiple of data.lanes 7; use lanes = 24"
    ):
        make_order(lanes=7)
    with pytest.raises(ConfigError, match="fewer than one global_batch of 24"):
        make_order(samples=10)


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(1, 1), (100, 100), (4096, 1024), (4095, 819), (2 * 1031, 2)]
)
def test_default_lanes_divide_the_batch(global_batch: int, lanes: int) -> None:
    assert default_lanes(global_batch) == lanes and global_batch % lanes == 0
