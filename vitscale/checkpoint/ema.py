"""The exponential moving average of the weights (Polyak averaging), kept sharded like the optimizer.

Each rank averages the fp32 masters that it owns: no communication, 4 bytes a parameter over the world size.
In a checkpoint it is one more state beside the optimizer's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint import state

EMA = "ema"


class Ema:
    """The average of an engine's weights; made when the engine holds the weights to begin with."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self.flats: list[Tensor] = [flat.detach().clone() for flat in state.flats(engine)]
        self._steps = state.optimizer_steps(engine)

    @torch.no_grad()
    def update(self, engine: Any) -> None:
        """average = decay x average + (1 - decay) x weights, once for every step that was not skipped."""
        steps = state.optimizer_steps(engine)
        if steps > self._steps:
            for mine, master in zip(self.flats, state.flats(engine), strict=True):
                mine.lerp_(master.detach(), 1 - self.decay)
            self._steps = steps

    def owned(self, engine: Any) -> dict[str, Tensor]:
        """This rank's part of the average of every parameter, as views."""
        return {
            fragment.name: fragment.of(self.flats[fragment.group]) for fragment in state.fragments(engine)
        }

    def restore(self, engine: Any, source: state.FragmentSource, saved: str = EMA) -> None:
        """Fill the average from the state `saved` of a checkpoint; no communication."""
        for fragment in state.fragments(engine):
            held = fragment.of(self.flats[fragment.group])
            source.read_into(held, saved, fragment.name, fragment.start)
        self._steps = state.optimizer_steps(engine)

    @contextlib.contextmanager
    def in_place(self, engine: Any) -> Iterator[None]:
        """Within the block the engine computes with the average; every rank enters it."""
        self._swap(engine)
        try:
            yield
        finally:
            self._swap(engine)

    @torch.no_grad()
    def _swap(self, engine: Any) -> None:
        # Values, not buffers: under ZeRO 3 in fp32 the live parameters are views of the masters.
        for mine, master in zip(self.flats, state.flats(engine), strict=True):
            held = master.detach().clone()
            master.detach().copy_(mine)
            mine.copy_(held)
        state.refresh_live(engine)
