"""The learning rate against the formulas of Google's code."""

import pytest

from vitscale.config import ConfigError
from vitscale.schedule import ScheduleConfig, learning_rate


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


def test_an_end_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'schedule.end_lr is read by decay = "linear" only'):
        ScheduleConfig(decay="cosine", end_lr=1e-5)
