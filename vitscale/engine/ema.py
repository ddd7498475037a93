"""The exponential moving average of the weights (Polyak averaging), sharded like the optimizer.

Each rank averages the fp32 master weights that it owns, without communication, for 4 bytes a
parameter over all ranks. In a checkpoint the average is one more slot, beside the optimizer's.

An update is lost to rounding in fp32 while |weights - average| is below half a unit in the last
place of the average over 1 - decay: 3e-4 to 6e-4 of a weight at a decay of 0.9999, 0.75e-3 to
1.5e-3 at 0.99996.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from vitscale.engine import zero
from vitscale.engine.fragments import EMA, Wanted


class Ema:
    """The average of an engine's weights, which starts at its present weights."""

    def __init__(self, ds: zero.DeepSpeed, decay: float) -> None:
        self._ds, self._decay = ds, decay
        self._flats: list[Tensor] = [flat.detach().clone() for flat in zero.flats(ds)]
        self._updates = zero.counters(ds).updates

    @torch.no_grad()
    def update(self) -> None:
        """average = decay x average + (1 - decay) x weights, unless the step was skipped."""
        updates = zero.counters(self._ds).updates
        if updates > self._updates:
            for average, master in zip(self._flats, zero.flats(self._ds), strict=True):
                average.lerp_(master.detach(), 1 - self._decay)
            self._updates = updates

    def owned(self) -> dict[str, Tensor]:
        """This rank's part of the average of every parameter, as views."""
        return {each.name: each.of(self._flats[each.group]) for each in zero.fragments(self._ds)}

    def wanted(self) -> list[Wanted]:
        """What a restore has to read; start comes after it."""
        fragments = zero.fragments(self._ds)
        return [Wanted(each.of(self._flats[each.group]), EMA, each.name, each.start) for each in fragments]

    def start(self, *, at_weights: bool) -> None:
        """Average from the present update on, starting at the weights or at what was read."""
        if at_weights:
            for average, master in zip(self._flats, zero.flats(self._ds), strict=True):
                average.copy_(master.detach())
        self._updates = zero.counters(self._ds).updates

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[None]:
        """Within the block, the engine computes with the average; every rank enters it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Swaps values, not buffers: in fp32, ZeRO 3's live parameters are views of the masters.
        for average, master in zip(self._flats, zero.flats(self._ds), strict=True):
            held = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(held)
        zero.refresh_live(self._ds)
