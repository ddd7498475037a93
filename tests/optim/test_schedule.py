"""The learning rate against the formulas of Google's code."""

from pathlib import Path

import pytest

from vitscale import config as configs
from vitscale.errors import ConfigError
from vitscale.optim.schedule import ScheduleConfig, learning_rate
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_warmup_multiplies_the_decay_curve() -> None:
    config = ScheduleConfig(decay="linear", warmup_steps=10_000, end_lr=1e-5)
    assert learning_rate(5_000, 100_000, 1e-3, config) == pytest.approx(0.5e-3)
    assert learning_rate(10_000, 100_000, 1e-3, config) == pytest.approx(1e-3)
    assert learning_rate(55_000, 100_000, 1e-3, config) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(100_000, 100_000, 1e-3, config) == pytest.approx(1e-5)


def test_cosine_halves_in_the_middle_and_ends_at_zero() -> None:
    config = ScheduleConfig(decay="cosine", warmup_steps=100)
    assert learning_rate(600, 1100, 0.03, config) == pytest.approx(0.015)
    assert learning_rate(1100, 1100, 0.03, config) == pytest.approx(0.0)


def test_rsqrt_falls_with_the_root_of_time_and_constant_does_not() -> None:
    config = ScheduleConfig(decay="rsqrt", warmup_steps=100, timescale_steps=400)
    assert learning_rate(100, 10_000, 1.0, config) == pytest.approx(1.0)
    assert learning_rate(1300, 10_000, 1.0, config) == pytest.approx(0.5)
    constant = ScheduleConfig(decay="constant", warmup_steps=10)
    assert [learning_rate(step, 100, 2.0, constant) for step in (5, 10, 100)] == [1.0, 2.0, 2.0]


def test_wsd_is_constant_between_warmup_and_cooldown_and_ends_at_zero() -> None:
    config = ScheduleConfig(decay="wsd", warmup_steps=10, cooldown_steps=20)
    rates = [learning_rate(step, 100, 2.0, config) for step in (5, 10, 50, 80, 85, 90, 99, 100)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.1, 0.0])


def test_rsqrt_may_have_a_cooldown_too() -> None:
    plain, cooled = (
        ScheduleConfig(decay="rsqrt", timescale_steps=50, cooldown_steps=steps) for steps in (0, 40)
    )
    for step, factor in ((1, 1.0), (60, 1.0), (70, 0.75), (100, 0.0)):
        rate = learning_rate(step, 100, 2.0, plain)
        assert learning_rate(step, 100, 2.0, cooled) == pytest.approx(factor * rate)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay": "wsd"}, r"schedule.cooldown_steps 0 must not be negative, and with decay = \"wsd\""),
        ({"decay": "rsqrt", "cooldown_steps": -1}, "schedule.cooldown_steps -1 must not be negative"),
        ({"decay": "cosine", "cooldown_steps": 5}, 'is read by decay = "wsd" and "rsqrt" only, not by "cos'),
    ],
)
def test_a_cooldown_that_makes_no_sense_is_refused(values: dict, message: str) -> None:
    ScheduleConfig(decay="wsd", cooldown_steps=1)
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**values)


def test_an_end_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'schedule.end_lr is read by decay = "linear" only'):
        ScheduleConfig(decay="cosine", end_lr=1e-5)


@pytest.mark.parametrize("decay", ["linear", "cosine", "rsqrt", "constant"])
def test_without_a_warmup_the_first_step_has_almost_the_peak_rate(decay: str) -> None:
    config = ScheduleConfig(decay=decay)
    assert learning_rate(1, 1000, 0.5, config) == pytest.approx(0.5, rel=2e-3)
    assert learning_rate(1, 1000, 0.5, config) <= 0.5


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (9, 0), (10, 1), (57, 5), (1000, 100)])
def test_a_warmup_as_a_fraction_is_that_of_as_many_steps_and_fits_into_any_run(
    total_steps: int, warmup_steps: int
) -> None:
    fraction, steps = ScheduleConfig(warmup_fraction=0.1), ScheduleConfig(warmup_steps=warmup_steps)
    for step in (1, warmup_steps, total_steps):
        rates = [learning_rate(step, total_steps, 0.5, config) for config in (fraction, steps)]
        assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps -1 and schedule.end_lr 0.0 must not be negative"),
        ({"end_lr": -1e-5}, "schedule.warmup_steps 0 and schedule.end_lr -1e-05 must not be negative"),
        ({"timescale_steps": 0}, "schedule.timescale_steps 0 must be above 0"),
        ({"warmup_fraction": 1.0}, r"schedule.warmup_fraction 1.0 must lie in \[0, 1\), like 0.1"),
        ({"warmup_fraction": -0.1}, r"schedule.warmup_fraction -0.1 must lie in \[0, 1\)"),
        ({"warmup_fraction": 0.1, "warmup_steps": 5}, "be 0 where schedule.warmup_steps is set"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    ScheduleConfig(decay="linear", warmup_steps=0, end_lr=0.0, timescale_steps=1)
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(decay="linear", **values)


def test_step_falls_to_a_tenth_after_each_drop() -> None:
    config = ScheduleConfig(decay="step", warmup_steps=10)  # VTAB: 750, 1,500 and 2,250 of 2,500 steps
    rates = {step: learning_rate(step, 2500, 0.1, config) for step in (5, 750, 751, 1500, 1501, 2250, 2251)}
    assert rates == pytest.approx(
        {5: 0.05, 750: 0.1, 751: 0.01, 1500: 0.01, 1501: 1e-3, 2250: 1e-3, 2251: 1e-4}
    )


@pytest.mark.parametrize("drops", [(0.0, 0.5), (0.5, 0.3), (0.5, 0.5), (0.5, 1.0)])
def test_drops_rise_within_the_run(drops: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.drops .* must rise within \(0, 1\)"):
        ScheduleConfig(drops=drops)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_bit_hyperrule_falls_where_big_transfers_code_does(name: str) -> None:
    """bit_hyperrule.py for 50,000 images: (500, 3000, 6000, 9000, 10000), 0.003 at first."""
    config = configs.load(TrainConfig, [ROOT / f"configs/finetune/bit_r50x1_{name}.toml"])
    assert (config.total_steps, config.global_batch, config.augment.mixup) == (10_000, 512, 0.1)
    rates = {250: 0.0015, 500: 3e-3, 3000: 3e-3, 3001: 3e-4, 6000: 3e-4, 6001: 3e-5, 9001: 3e-6, 10_000: 3e-6}
    for step, rate in rates.items():
        assert learning_rate(step, 10_000, config.optim.lr, config.schedule) == pytest.approx(rate), step
