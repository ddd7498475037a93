"""Norms of the weights, the gradients and the updates of one optimizer step, layer by layer."""

import math

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.engine import zero
from vitscale.engine.engine import Engine
from vitscale.engine.fragments import FP32
from vitscale.optim.optimizers import OptimConfig, block_kernels, layer_name

_KINDS = ("weight", "grad", "update")


class StepNorms:
    """Compares what an optimizer step changes with a copy from before it.

    The copy has the masters and the first moments of this rank's fragments: 8 bytes for each
    parameter that the rank owns, while the step lasts. The gradient is what the moments m were
    given, so that it is known however ZeRO cuts and frees the gradients themselves:

        AdamW   m' = beta1 m + (1 - beta1) g      g = (m' - beta1 m) / (1 - beta1)
        SGD     m' = momentum m + g               g = m' - momentum m
        Muon    as AdamW, with momentum as the beta1 of matrices

    Adafactor's moments are given updates, not gradients, so it has no norms of gradients.
    """

    def __init__(self, engine: Engine, config: OptimConfig) -> None:
        """Take the copy; every rank calls it, before the step."""
        self._engine, self._config = engine, config
        self._slot = "momentum_buffer" if config.name == "sgd" else "exp_avg"
        self._matrices = block_kernels(engine.module) if config.name == "muon" else set[str]()
        self._kinds = [kind for kind in _KINDS if kind != "grad" or config.name != "adafactor"]
        self._updates = engine.counters.updates
        owned = engine.owned()
        self._masters = _copied(owned[FP32])
        moments = owned.get(self._slot, {})  # none before the first update
        self._moments = _copied(moments if "grad" in self._kinds else {})

    def read(self) -> dict[str, float]:
        """{"weight_norm/blocks.0": 7.1, "grad_norm/blocks.0": 0.2, "update_norm/blocks.0": ...}

        Gradients are those before clipping. Every rank calls it after the step and gets the
        same; empty if the step was skipped.
        """
        if self._engine.counters.updates == self._updates:
            return {}
        owned = self._engine.owned()
        # The same layers on every rank: a rank may own nothing of some.
        layers = list(dict.fromkeys(map(layer_name, self._engine.shapes())))
        squares = {(kind, layer): 0.0 for kind in self._kinds for layer in layers}
        has_gradients = "grad" in self._kinds
        unclipped = self._unclipped() if has_gradients else 1.0
        norms: list[tuple[str, str, Tensor]] = []
        for name, master in owned[FP32].items():
            layer = layer_name(name)
            norms.append(("weight", layer, _norm(master)))
            norms.append(("update", layer, _norm(master - self._masters[name])))
            if has_gradients:
                gradient = self._gradient(name, owned[self._slot][name], unclipped)
                norms.append(("grad", layer, _norm(gradient)))
        values = zero.read_scalars([norm for *_, norm in norms])
        for (kind, layer, _), value in zip(norms, values, strict=True):
            squares[kind, layer] += value**2
        total = distributed.all_reduce_sum(list(squares.values()))
        return {
            f"{kind}_norm/{layer}": math.sqrt(square)
            for (kind, layer), square in zip(squares, total, strict=True)
        }

    def _gradient(self, name: str, moment: Tensor, unclipped: float) -> Tensor:
        """The gradient, before clipping, that a moment was given. unclipped: of _unclipped."""
        decays = self._config.name == "sgd" or name in self._matrices
        decay = self._config.momentum if decays else self._config.betas[0]
        before = self._moments.get(name)
        given = moment if before is None else moment - decay * before
        return given * (unclipped / (1.0 if self._config.name == "sgd" else 1 - decay))

    def _unclipped(self) -> float:
        """By how much the gradients were divided for clipping, as DeepSpeed does it."""
        clip = self._config.clip_norm
        return max(1.0, (float(self._engine.grad_norm()) + 1e-6) / clip) if clip else 1.0


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64)
