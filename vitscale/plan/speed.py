"""What share of a GPU's peak a training step reaches: by arithmetic, and by measurements.

A measurement is a file of `tools/bench.py step`. It has a few models on one GPU; for a model
between two of them in width, the factor between measurement and guess is interpolated.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vitscale.config import from_dict
from vitscale.errors import ConfigError
from vitscale.memory import activation_bytes, count_params, vit_activation_bytes
from vitscale.models import ModelConfig
from vitscale.models.flops import train_flops
from vitscale.models.layers import Checkpointing
from vitscale.models.resnet import ResNetConfig
from vitscale.plan.formulas import (
    FORWARD_PASSES,
    RESNET_TRAFFIC,
    VIT_TRAFFIC,
    model_flops_utilization,
    pass_seconds,
    update_seconds,
)
from vitscale.system.hardware import Gpu, gpu_of

EAGER = 0.85  # without compilation; B/16 on an H200 (docs/measurements.md)
DECODE_RATE = 500.0  # a guess: images/s of a core, of photographs of 110 kB (docs/measurements.md)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of a results file: seconds of the forward and backward pass of an image."""

    model: ModelConfig
    compiled: bool
    checkpointing: Checkpointing
    seconds_per_image: float
    gpu: Gpu

    @property
    def efficiency(self) -> float:
        flops = train_flops(self.model)
        return model_flops_utilization(1 / self.seconds_per_image, flops, 1, self.gpu.flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What a plan takes as the speed of GPUs and of the loader; without rows, a guess.

    device: what was measured, also if no row is of the kind of model that is planned.
    decode_rate: images/s of a data worker of the run that was measured end to end, 0 if there
    is none.
    """

    rows: tuple[Measured, ...] = ()
    device: str = ""
    decode_rate: float = 0.0

    def efficiency(self, model: ModelConfig, gpu: Gpu, *, compiled: bool) -> float:
        """The share of the peak of a step without recomputation, and without the update."""
        width = model.resolved_width
        guess = _guess(model, gpu, compiled)
        rows = self._rows("none", compiled)
        if not rows:
            return guess
        rows = [row for row in rows if _alike(row.model, model)] or rows
        factors: dict[int, list[float]] = {}
        for row in rows:
            factor = row.efficiency / _guess(row.model, row.gpu, row.compiled)
            factors.setdefault(row.model.resolved_width, []).append(factor)
        widths = sorted(factors)
        means = [sum(factors[width]) / len(factors[width]) for width in widths]
        return guess * float(np.interp(math.log(width), np.log(widths), means))

    def of_kind(self, kind: str) -> "Speed":
        """The same with rows of one kind of model alone."""
        rows = tuple(row for row in self.rows if row.model.kind == kind)
        return dataclasses.replace(self, rows=rows)

    def work(self, policy: Checkpointing, *, compiled: bool) -> float:
        """How much longer the passes take with a policy than without recomputation."""
        ratios = self._ratios(policy, compiled)
        return sum(ratios) / len(ratios) if ratios else FORWARD_PASSES[policy] / FORWARD_PASSES["none"]

    def has_measured(self, model: ModelConfig, *, compiled: bool) -> bool:
        """Whether a row without recomputation is of this model and mode, and not a near one."""
        rows = [row for row in self.rows if (row.checkpointing, row.compiled) == ("none", compiled)]
        return any(_alike(row.model, model) for row in rows)

    def is_measured(self, policy: Checkpointing, *, compiled: bool) -> bool:
        return policy == "none" or bool(self._ratios(policy, compiled))

    def _rows(self, policy: Checkpointing, compiled: bool) -> list[Measured]:
        """The rows of a policy: of those that are compiled, or not, as wanted, or else all."""
        rows = [row for row in self.rows if row.checkpointing == policy]
        return [row for row in rows if row.compiled == compiled] or rows

    def _ratios(self, policy: Checkpointing, compiled: bool) -> list[float]:
        return [
            row.seconds_per_image / base.seconds_per_image
            for row in self._rows(policy, compiled)
            for base in self.rows
            if (base.model, base.compiled, base.checkpointing) == (row.model, row.compiled, "none")
        ]


def read_measurements(path: Path) -> Speed:
    """The speeds in a file of `tools/bench.py step`. Raises ConfigError for any other file."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"--calibrate {path} cannot be read: {reason}; {_HOW}") from None
    results = file.get("results", file) if isinstance(file, dict) else {}
    try:
        return _speed_of(results, path)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise ConfigError(f"--calibrate {path} does not hold results of a step; {_HOW}") from None


_HOW = "name a file that `python tools/bench.py step` of this version wrote with --suite or --json"


def row_name(loop: str, policy: Checkpointing, *, compiled: bool) -> str:
    """What the file calls a row: "vitscale, full recomputation, compiled"."""
    recomputed = f", {policy} recomputation" if policy != "none" else ""
    return f"{loop}{recomputed}{', compiled' if compiled else ''}"


def _speed_of(results: Mapping[str, Any], path: Path) -> Speed:
    whole = [results] if "images of a step" in results else list(results.values())
    pieces = [piece for piece in whole if isinstance(piece, dict) and "images of a step" in piece]
    rows = tuple(row for piece in pieces if piece["precision"] == "bf16" for row in _rows_of(piece, path))
    if not any(row.checkpointing == "none" for row in rows):
        raise ConfigError(
            f"--calibrate {path} has no row of vitscale in bf16 without recomputation, which all others are "
            "compared with; measure one: python tools/bench.py step --policies none --json OUT"
        )
    rate = results.get("end to end", {}).get("images/s per data worker", 0.0)
    return Speed(rows=rows, device=pieces[0]["device"], decode_rate=float(rate))


def _rows_of(piece: Mapping[str, Any], path: Path) -> list[Measured]:
    try:
        model: ModelConfig = from_dict(ModelConfig, piece["config"], "config")
    except ConfigError as error:
        raise ConfigError(f"--calibrate {path}: {error}") from None
    images = piece["images of a step"]
    gpu = gpu_of(piece["device"])
    if gpu is None:
        raise ConfigError(f"--calibrate {path} was measured on {piece['device']}, whose peak is not known")
    update = update_seconds(count_params(model), 1, gpu.memory_tb_per_s)
    return [
        Measured(
            model=model,
            compiled=compiled,
            checkpointing=policy,
            seconds_per_image=1 / row["images/s"] - update / images,
            gpu=gpu,
        )
        for policy in get_args(Checkpointing)
        for compiled in (False, True)
        if "images/s" in (row := piece.get(row_name("vitscale", policy, compiled=compiled), {}))
    ]


def _alike(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether a step of two models computes and moves the same; their heads may differ."""
    same_kind, same_flops = a.kind == b.kind, train_flops(a) == train_flops(b)
    return same_kind and same_flops and _memory_traffic(a) == _memory_traffic(b)


def _guess(model: ModelConfig, gpu: Gpu, compiled: bool) -> float:
    """From what an image's passes compute, and move to and from memory."""
    flops = train_flops(model)
    seconds = pass_seconds(flops, _memory_traffic(model), gpu.flops, gpu.memory_tb_per_s)
    return flops / gpu.flops / seconds * (1.0 if compiled else EAGER)


def _memory_traffic(model: ModelConfig) -> int:
    """Bytes of an image in 16 bit, without recomputation."""
    kept = _kept_bytes(activation_bytes, model)
    if isinstance(model, ResNetConfig):
        return RESNET_TRAFFIC * kept
    of_blocks = _kept_bytes(vit_activation_bytes, model)
    return VIT_TRAFFIC * of_blocks + RESNET_TRAFFIC * (kept - of_blocks)


def _kept_bytes(count: Callable[[Any, int, str, Checkpointing], int], model: ModelConfig) -> int:
    """What one more image adds to the activations."""
    return count(model, 2, "bf16", "none") - count(model, 1, "bf16", "none")
