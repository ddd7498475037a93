"""Small real checkpoints for the tests: every kind of tensor and state, cut at odd places among ranks."""

import itertools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint import store
from vitscale.checkpoint.format import Manifest, TensorInfo, write_safetensors

STATES = ("fp32", "exp_avg", "exp_avg_sq", "ema")
SHAPES = {"patch.weight": (7, 11), "norm.bias": (3,), "scale": (), "head.weight": (5, 8)}
# What is not trained: a frozen parameter, and buffers of integers and of truth values.
FIXED = {
    "pos_embed": torch.linspace(-1, 1, 10).view(2, 5),
    "count": torch.tensor(2**40 + 1),
    "mask": torch.tensor([True, False, True]),
}
CONFIG: dict[str, Any] = {
    "run_dir": "runs/a",
    "seed": 3,
    "model": {"variant": "Ti/4", "width": 16},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "engine": {"zero_stage": 1},
    "evals": {},
}


def state_of(step: int) -> dict[tuple[str, str], Tensor]:
    """(state, name) to the whole tensor, other values at every step."""
    generator = torch.Generator().manual_seed(step)
    trained = {
        (state, name): torch.randn(shape, generator=generator)
        for state in STATES
        for name, shape in SHAPES.items()
    }
    return {**trained, **{("fixed", name): tensor for name, tensor in FIXED.items()}}


def write_step(
    run: Path, step: int, tensors: dict[tuple[str, str], Tensor], *, world_size: int = 3, **header: Any
) -> Path:
    """A committed checkpoint RUN/checkpoints/step-...; `header` replaces what its manifest says."""
    folder = store.step_directory(store.directory_of(run), step)
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(name for _, name in tensors))
    chance = random.Random(step)
    cuts = {}
    for name in names:
        total = next(tensor.numel() for (_, other), tensor in tensors.items() if other == name)
        inner = sorted(chance.randint(0, total) for _ in range(world_size - 1))
        cuts[name] = [(start, end - start) for start, end in itertools.pairwise([0, *inner, total])]
    files, fragments = {}, {name: [] for name in names}
    for rank in range(world_size):
        file = f"rank-{rank:05d}.safetensors"
        pieces = {
            f"{state}/{name}": tensor.reshape(-1).narrow(0, *cuts[name][rank])
            for (state, name), tensor in tensors.items()
            if cuts[name][rank][1]
        }
        files[file] = write_safetensors(folder / file, pieces, {"format": "pt"})
        for name in names:
            if cuts[name][rank][1]:
                fragments[name].append((file, *cuts[name][rank]))
    shapes = {name: tuple(tensor.shape) for (_, name), tensor in tensors.items()}
    fixed = {name for state, name in tensors if state == "fixed"}
    values = {
        "step": step,
        "samples_seen": step * 8,
        "epoch": 1,
        "step_in_epoch": step - 10,
        "data_fingerprint": "f00-pillow",
        "optimizer": "adamw",
        "optimizer_steps": step,
        "states": STATES,
        "world_size": world_size,
        "zero_stage": 1,
        "precision": "fp32",
        "loss_scaler": {},
        "counters": {"global_steps": step, "bad_samples": 0},
        "config": CONFIG,
        "versions": {"vitscale": "0.1.0"},
        "created": "2026-01-02T03:04:05+00:00",
        "files": files,
        "tensors": {
            name: TensorInfo(shape=shapes[name], fragments=tuple(fragments[name]), fixed=name in fixed)
            for name in names
        },
    }
    Manifest(**{**values, **header}).save(folder / "manifest.json")
    return folder
