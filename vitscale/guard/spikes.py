"""Steps whose loss stands out, with the samples that they trained on: RUN/spikes.jsonl.

    {"step": 8123, "data_step": 8123, "loss": 9.7, "median": 2.31, "deviation": 0.04,
     "samples": ["s3://in21k/train-000812.tar, bytes 1,024 to 98,304, sample number 512,033",
                 ...]}

A loss stands out if it is far above the median of the losses before it, in units of their
deviation (1.4826 x the median absolute deviation, which is that of a normal distribution), or
is not finite. After NEEDED finite ones, with none in between that does not stand out, the loss
has a new level, and the losses before are forgotten.
"""

import collections
import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vitscale import distributed
from vitscale.data.reader import describe
from vitscale.data.sources import Source
from vitscale.system import atomic

logger = logging.getLogger(__name__)
FILE_NAME = "spikes.jsonl"
REMEMBERED, NEEDED = 200, 50  # losses before a step; with fewer, it is not judged


class Normal:
    """The losses of the last steps that did not stand out."""

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._losses: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._num_above = 0  # in a row, up to the last one

    def stands_out(self, loss: float) -> bool:
        """Whether a loss is far above those before it; if not, it becomes one of them."""
        median, deviation = self.median_and_deviation()
        enough = len(self._losses) >= NEEDED
        if not math.isfinite(loss):
            return True
        if enough and loss > median + self._deviations * deviation:
            self._num_above += 1
            if self._num_above == NEEDED:
                self._losses.clear()
            return True
        self._num_above = 0
        self._losses.append(loss)
        return False

    def median_and_deviation(self) -> tuple[float, float]:
        """Of the losses before; (nan, nan) if there are none."""
        if not self._losses:
            return math.nan, math.nan
        median = statistics.median(self._losses)
        return median, 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)


class Spikes:
    """Looks at the loss of every step, when a row is logged: nothing waits for a GPU before."""

    def __init__(
        self, run_dir: str, sources: Sequence[Source], first_ids: Sequence[int], deviations: float
    ) -> None:
        """first_ids: of the first sample of each source. deviations: 0 = look at nothing."""
        self._path, self._sources, self._first_ids = Path(run_dir) / FILE_NAME, sources, first_ids
        self._normal = Normal(deviations)
        self._on = deviations > 0
        self._steps: list[tuple[dict[str, int], Tensor, Int64[np.ndarray, " n"]]] = []

    def add(self, step: int, data_step: int, loss: Tensor, ids: Int64[np.ndarray, " n"]) -> None:
        """Note this rank's part of a step: its mean loss, and the samples."""
        if self._on:
            self._steps.append(({"step": step, "data_step": data_step}, loss, ids))

    def write(self) -> None:
        """Write down which steps since the last call stand out; every rank calls it."""
        if not self._steps:
            return
        own = torch.stack([loss for _, loss, _ in self._steps]).double().cpu()
        world = distributed.world_size()
        losses = [total / world for total in distributed.all_reduce_sum(own.tolist())]
        for (steps, _, ids), loss in zip(self._steps, losses, strict=True):
            median, deviation = self._normal.median_and_deviation()
            if self._normal.stands_out(loss):
                parts = distributed.gather_rows_to_main(torch.from_numpy(ids))
                if distributed.is_main():
                    self._write(steps, loss, median, deviation, torch.cat(parts).tolist())
        self._steps = []

    def _write(
        self, steps: dict[str, int], loss: float, median: float, deviation: float, ids: Sequence[int]
    ) -> None:
        numbers = {"loss": loss, "median": median, "deviation": deviation}
        row = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        with atomic.named(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**steps, **row, "samples": [self._place(id) for id in ids]}) + "\n")
        logger.warning(
            "the loss of step %d, %.4g, stands out (median before it: %.4g); %s names its samples",
            steps["step"],
            loss,
            median,
            self._path,
        )

    def _place(self, sample_id: int) -> str:
        source = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return describe(self._sources[source].index, sample_id - self._first_ids[source])
