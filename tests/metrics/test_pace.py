"""The rank that slows the others down is found, and named once it stays so."""

import time

import pytest

from vitscale.metrics.pace import Pace, SlowRank, slowest


def test_the_slowest_rank_and_by_how_much() -> None:
    rank, ratio = slowest([1.0, 1.1, 1.6, 1.0])
    assert rank == 2 and ratio == pytest.approx(1.6 / 1.05)
    assert slowest([0.5]) == (0, 1.0) and slowest([0.0, 0.0]) == (0, 1.0)


def test_what_passes_between_forward_passes_does_not_count() -> None:
    pace = Pace()
    for _ in range(2):
        with pace.forward():
            time.sleep(0.02)
        time.sleep(0.2)
    assert 0.04 <= pace.read() < 0.2 and pace.read() == 0.0


def test_a_rank_is_named_once_and_only_if_it_stays_slow(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowRank(["c1", "c1", "c2", "c2"])
    for rank, ratio in [(2, 1.5), (2, 1.5), (1, 1.5), (2, 1.5), (2, 1.5), (2, 1.2), (2, 1.5), (2, 1.5)]:
        slow.add(rank, ratio)
    assert not caplog.messages
    for _ in range(5):
        slow.add(2, 1.43)
        (said,) = caplog.messages  # from the third row in succession on
    assert said.startswith(
        "rank 2 on c2 is slow: its forward passes take 1.43 times as long as the median of"
    )
