"""How long a rank computes for itself, to find the rank that slows all others down.

A step takes equally long on all ranks, as they wait for one another in its collectives. The
forward passes have none (at ZeRO 3 they gather weights, and a slow rank shows less).
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from vitscale import distributed

logger = logging.getLogger(__name__)
SLOW = 1.25  # times the median
ROWS = 3  # of the log, in which a rank must be slow before it is named


class Pace:
    """The time of this rank's forward passes. On a GPU nothing waits for it before `read`."""

    def __init__(self) -> None:
        self._on_gpu = distributed.device().type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Within the block, this rank runs a forward pass."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def read(self) -> float:
        """The seconds since the last call."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """The slowest of the ranks, and how many times the median it takes; 1.0 if they took none.

    For example, [1.0, 1.1, 1.6, 1.0] gives (2, 1.52): the median is 1.05.
    """
    rank = max(range(len(seconds)), key=lambda rank: seconds[rank])
    median = statistics.median(seconds)
    return rank, seconds[rank] / median if median else 1.0


class SlowRank:
    """Names a rank that stays slow, once. hosts: of all ranks."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts, self._rows, self._named = hosts, dict.fromkeys(range(len(hosts)), 0), set[int]()

    def add(self, rank: int, ratio: float) -> None:
        """Count a row of the log with its slowest rank."""
        rows = self._rows[rank] + 1 if ratio > SLOW else 0
        self._rows = {**dict.fromkeys(self._rows, 0), rank: rows}
        if rows >= ROWS and rank not in self._named:
            self._named.add(rank)
            logger.warning(
                "rank %d on %s is slow: its forward passes take %.2f times as long as the median of all "
                "ranks, and all wait for it; look at its clock, its temperature and its neighbours",
                rank,
                self._hosts[rank],
                ratio,
            )
