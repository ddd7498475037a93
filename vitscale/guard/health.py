"""Whether a run is still sound: finite losses and gradients, and no skipped steps.

A step whose gradients are not finite is skipped: the weights stay as they are. In fp16 single
skipped steps are how the loss scale is found, and no sign of trouble while it can still fall.
"""

import math

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.engine.engine import Engine


class Health:
    """What happened since the last checkpoint; every rank has one.

    limit: so many skipped steps in a row are too many.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine, self._limit = engine, limit
        self._num_skipped = engine.counters.skipped_steps
        self._skipped = False
        self._not_finite = torch.zeros((), dtype=torch.bool, device=distributed.device())
        self._in_a_row = 0
        self._may_fall = _may_fall(engine)

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row were skipped; the same on all ranks."""
        return self._in_a_row >= self._limit

    def add(self, loss: Tensor) -> None:
        """Count a step of this mean loss. Nothing is read from a GPU."""
        counters = self._engine.counters
        # In fp16, a scale that could still fall may be what was wrong.
        may_fall, self._may_fall = self._may_fall, _may_fall(self._engine)
        skipped = counters.skipped_steps > self._num_skipped
        self._num_skipped = counters.skipped_steps
        if not skipped:
            self._in_a_row = 0
            self._not_finite |= ~(torch.isfinite(loss) & torch.isfinite(self._engine.grad_norm()))
            return
        self._skipped = self._skipped or not may_fall
        if counters.updates or not may_fall:  # fp16 begins with a scale that is too high
            self._in_a_row += 1

    def since_last_save(self) -> bool:
        """Whether all was sound since the last call; every rank calls it, before a save."""
        trouble = distributed.any_of(self._skipped or bool(self._not_finite))
        self._skipped = False
        self._not_finite.zero_()
        return not trouble


def _may_fall(engine: Engine) -> bool:
    """Whether the loss scale of the next step can fall; False without a dynamic one."""
    scaler = engine.loss_scaler
    return scaler.get("cur_scale", 0.0) > scaler.get("min_scale", math.inf)
