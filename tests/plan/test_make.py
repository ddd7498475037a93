"""Plans of whole configs: what fits, what is chosen, what follows, and what is refused."""

import contextlib
import dataclasses

import pytest
from plan.plans import B16, H14, ROOT, at_half_the_peak, load, option_of, plan

from vitscale import memory
from vitscale.data.sources import open_sources
from vitscale.errors import ConfigError
from vitscale.job import worlds
from vitscale.plan.make import Cluster, choose, num_steps


def test_h14_on_one_node_is_4_percent_slower_than_with_hidden_communication() -> None:
    """The row of test_formulas.py has 261 ms and 3,919 images/s, since it hides 4 N bytes.

    N gradients of 4 bytes and N weights of 2 are sent, 3.94e9 bytes at 360 GB/s * 8/7, after
    the backward pass: 9.6 ms, or with gradients of 2 bytes 6.4. N is 655,835,251 here, with the
    config's 18,291 classes.
    """
    config = load(H14, "global_batch=1024")
    option = option_of(plan(config, 8, speed=at_half_the_peak(config)), 1)
    assert (option.micro_batch, option.accumulation) == (128, 1)
    assert 1e3 * option.compute_seconds == pytest.approx(259.8, abs=0.1)
    assert 1e3 * option.exposed_seconds == pytest.approx(9.7, abs=0.1)
    assert 1e3 * option.update_seconds == pytest.approx(0.92, abs=0.01)
    assert 1e3 * option.step_seconds == pytest.approx(270.5, abs=0.2)
    assert option.images_per_second == pytest.approx(3_919 / 1.036, rel=0.003)
    assert option.mfu == pytest.approx(0.5 * 259.8 / 270.5, rel=0.001)
    rounded = option_of(plan(load(H14, "global_batch=1024", "engine.reduce_precision=bf16"), 8), 1)
    assert 1e3 * rounded.exposed_seconds == pytest.approx(6.6, abs=0.1)


def test_h14_on_sixteen_nodes_is_4_percent_slower_than_with_hidden_communication() -> None:
    """The row has 60,400 images/s and 0.87 days at an MFU of 45%, without what is lost."""
    config = load(H14, "global_batch=16384")
    made = plan(config, 128, speed=at_half_the_peak(config), price=2.5)
    assert made.best is option_of(made, 1) and made.best.micro_batch == 128
    assert made.best.images_per_second == pytest.approx(60_400 / 1.045, rel=0.003)
    ideal = made.num_images / made.best.images_per_second / 86_400
    assert made.days == pytest.approx(ideal * 1.0023, rel=1e-4)
    assert made.days * made.best.mfu == pytest.approx(0.87 * 0.45, rel=0.01)
    assert made.cost == pytest.approx(24 * 128 * 2.5 * made.days)


def test_the_micro_batch_is_the_largest_that_fits_and_divides() -> None:
    config = load(B16, "global_batch=1536", "model.dropout=0.0")
    option = option_of(plan(config, 1, gpu_memory_gb=40.0), 1)
    assert option.micro_batch == 512 and option.accumulation == 3
    assert option.memory.total <= 40e9
    larger = memory.estimate(config.model, config.engine, 768, 1, "bf16")
    assert larger.total > 40e9
    exactly = plan(config, 1, gpu_memory_gb=larger.total / 1e9 + 1e-9)
    assert option_of(exactly, 1).micro_batch == 768


def test_mixup_leaves_even_micro_batches() -> None:
    """36 images fit whole or in pairs; 9 do not."""
    odd = load(B16, "global_batch=18")
    sizes = {gb: option_of(plan(odd, 1, gpu_memory_gb=gb), 1).micro_batch for gb in (5.0, 80.0)}
    even = load(B16, "global_batch=18", "augment.mixup=0.2")
    paired = {gb: option_of(plan(even, 1, gpu_memory_gb=gb), 1).micro_batch for gb in (5.0, 80.0)}
    assert sizes == {5.0: 9, 80.0: 18} and paired == {5.0: 6, 80.0: 18}


def test_among_options_that_are_nearly_as_fast_the_simplest_is_chosen() -> None:
    options = plan(load(H14), 8).options
    speeds = [100, 99, 80, 101, 112, 0, 0, 0, 0]
    fast = [
        dataclasses.replace(option, images_per_second=float(speed), micro_batch=4)
        for option, speed in zip(options, speeds, strict=True)
    ]
    small, large = 10**9, 10**10
    assert choose(fast, small) is fast[3]  # 100 is below 0.9 * 112
    assert choose(fast[:4], small) is fast[0]
    none = [dataclasses.replace(option, micro_batch=0) for option in fast]
    assert choose(none, small) is None
    assert choose([none[0], fast[2]], small) is fast[2]
    hiding = dataclasses.replace(options[6], images_per_second=200.0, micro_batch=4)
    assert hiding.zero_stage == 3 and choose([*fast, hiding], large) is hiding
    assert choose([*fast, hiding], small) is fast[3]
    assert choose([*none, hiding], small) is hiding


def test_an_option_that_overlaps_nothing_pays_for_accumulation_at_stage_2_only() -> None:
    """An L40S has 48 GB: 8 micro steps of 16 images or less."""
    made = plan(load(H14, "global_batch=2048"), 8, gpu="l40s")
    one, two = option_of(made, 1), option_of(made, 2)
    assert two.accumulation == 4 and one.accumulation == 4
    # Of N parameters, 4 * 8 + 2 bytes each, and 4 + 2.
    assert two.exposed_seconds == pytest.approx(34 / 6 * one.exposed_seconds, rel=0.01)


def test_saves_wait_for_the_one_before() -> None:
    """8 GB at 1 MB/s take two hours, more than the best interval of 22 minutes."""
    slow = plan(load(H14), 128, store_gb_per_s=0.001).saving
    fast = plan(load(H14), 128).saving
    assert slow and fast and fast.interval_seconds / 60 == pytest.approx(21.5, abs=0.1)
    assert fast.num_bytes == 12 * 655_835_251
    assert slow.interval_seconds == pytest.approx(7_870 + slow.blocking_seconds, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 311_940),  # 90 epochs of 14,197,122 // 4,096 = 3,466 steps
        (["total_epochs=2"], 2 * 3_466),
        (["total_steps=20000"], 20_000),
        (["total_samples=81920001", "data.num_samples=0"], 20_000),
        (["total_steps=20000", "data.num_samples=0"], 20_000),
        (["augment.repeats=2", "total_epochs=1", "schedule.warmup_steps=0"], 6_932),
    ],
)
def test_the_length_of_a_run_is_known_without_its_data(overrides: list[str], steps: int) -> None:
    config = load(B16, "schedule.warmup_steps=100", *overrides)
    assert num_steps(config) == steps


@pytest.mark.parametrize(("lanes", "num_worlds"), [(0, 10), (352, 0)])
def test_a_plan_takes_the_worlds_that_training_takes(lanes: int, num_worlds: int) -> None:
    """Of 1,056 images, 352 are drawn: 176 lanes draw two each, and 352 a single one."""
    path = ROOT / "configs/pretrain/deit_b16_imagenet.toml"
    config = load(path, f"data.lanes={lanes}", "engine.micro_batch=0")
    data, batch, taken = config.data, config.global_batch, list[int]()
    for gpus in (n for n in range(1, batch + 1) if batch % n == 0):
        with contextlib.suppress(ConfigError):
            plan(config, gpus, gpus_per_node=gpus)
            taken.append(gpus)
    assert taken == worlds(config, open_sources(data, data.all_sources())) and len(taken) == num_worlds


def test_where_gpus_cannot_share_the_lanes_the_way_out_is_one() -> None:
    config = load(ROOT / "configs/pretrain/deit_b16_imagenet.toml", "augment.mixup=0", "augment.cutmix=0")
    with pytest.raises(ConfigError, match=r"; set data.lanes to a multiple of it that .* 352 .*, like 32$"):
        plan(config, 32)
    assert plan(dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=32)), 32).best
    with pytest.raises(ConfigError, match="--gpus 96 does not divide the 176 lanes of the data; use a div"):
        plan(config, 96)
    assert plan(config, 88).best


def test_a_cluster_may_be_smaller_than_a_node() -> None:
    assert Cluster(gpus=3).nodes == 1 and Cluster(gpus=16).nodes == 2 and Cluster(gpus=8).nodes == 1
    assert Cluster(gpus=6, gpus_per_node=2).nodes == 3
    with pytest.raises(ConfigError, match="use 8"):
        Cluster(gpus=9)


def test_one_gpu_sends_nothing() -> None:
    made = plan(load(H14), 1)
    assert all(option.exposed_seconds == 0 for option in made.options)
