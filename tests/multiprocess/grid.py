"""Ranks that write checkpoints at every ZeRO stage and precision, and ranks that read all of them again.

The model has what a checkpoint must not forget: two parameter groups, frozen parameters, a buffer of floats
and one of integers, and an average of the weights. Parameters of 1 and of odd sizes fall between the ranks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale import distributed
from vitscale import engine as engines
from vitscale.checkpoint import load, snapshot, state
from vitscale.checkpoint.ema import EMA, Ema
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.store import Home
from vitscale.engine import EngineConfig, deepspeed_config, plan_batches
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig
from vitscale.optim import OptimConfig, build_optimizer, freeze

GLOBAL_BATCH = 12
MODEL = ModelConfig(variant="Ti/4", width=12, depth=2, num_heads=3, mlp_dim=19, image_size=8, num_classes=1)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5, freeze=("blocks.0.*",), ema_decay=0.9)
MODES = {  # precision, what differs in [engine]
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "offload": ("fp32", {"offload_optimizer": True}),
}


def write(folder: str, modes: str) -> None:
    """Train two steps at every stage, save, and note the losses of the next two steps."""
    distributed.initialize()
    for mode in modes.split():
        for stage in (1, 2, 3):
            engine, ema = make_engine(mode, stage, seed=1)
            for step in range(2):
                train_step(engine, ema, step)
            home = Home(Path(folder) / name_of(mode, stage))
            snapshot.write(snapshot.take(engine, OPTIM.name, header(engine, mode), ema, None), home)
            losses = [train_step(engine, ema, step) for step in (2, 3)]
            if distributed.is_main():
                (home.directory / "losses.json").write_text(json.dumps(losses))
            distributed.barrier()
            engine.destroy()


def read(folder: str, modes: str, result: str) -> None:
    """Restore every checkpoint of `folder` into an engine of every stage and mode, one after the other; check
    every value, and note the losses of the next two steps.
    """
    distributed.initialize()
    found: dict[str, list[float]] = {}
    for mode in modes.split():
        for stage in (1, 2, 3):
            engine, ema = make_engine(mode, stage, seed=2)
            for path in sorted(Path(folder).iterdir()):
                checkpoint = load.find(Home(path))
                assert checkpoint
                load.resume(engine, checkpoint, OPTIM.name, ema)
                ema.update(engine)  # no step was made since: as where the first one is skipped
                check_values(engine, ema, checkpoint)
                losses = [train_step(engine, ema, step) for step in (2, 3)]
                found[f"{path.name} {name_of(mode, stage)}"] = losses
            engine.destroy()
    if distributed.is_main():
        Path(result).write_text(json.dumps(found))


def name_of(mode: str, stage: int) -> str:
    return f"{mode}-zero{stage}-world{distributed.world_size()}"


def make_engine(mode: str, stage: int, seed: int) -> tuple[Any, Ema]:
    precision, options = MODES[mode]
    config = EngineConfig(zero_stage=stage, **options)
    plan = plan_batches(GLOBAL_BATCH, 0, distributed.world_size())
    model = build_model(MODEL, seed)
    model.register_buffer("centre", torch.randn(5, generator=torch.Generator().manual_seed(seed)))
    model.register_buffer("counts", torch.arange(7) + (1 << 40) * seed)
    with torch.no_grad():  # a head of zeros would hide what is behind it
        model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    freeze(model, OPTIM.freeze)
    optimizer = build_optimizer(OPTIM, model)
    derived = deepspeed_config(config, plan, precision, OPTIM.clip_norm)
    engine = engines.start_engine(model, optimizer, config, plan, derived)
    return engine, Ema(engine, OPTIM.ema_decay)


def train_step(engine: Any, ema: Ema, step: int) -> float:
    """One step on this rank's part of the batch; returns the loss of the whole batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
    targets = torch.randn(GLOBAL_BATCH, 1, generator=generator)
    each = GLOBAL_BATCH // distributed.world_size()
    mine = slice(distributed.rank() * each, (distributed.rank() + 1) * each)
    outputs = engine(images[mine].to(next(engine.module.parameters()).dtype)).float()
    loss = (outputs - targets[mine]).square().mean()
    engine.backward(loss)
    engine.step()
    ema.update(engine)
    return distributed.all_reduce_sum([loss.item()])[0] / distributed.world_size()


def header(engine: Any, mode: str) -> dict[str, Any]:
    return {
        "step": int(engine.global_steps),
        "samples_seen": 0,
        "epoch": 0,
        "step_in_epoch": 0,
        "data_fingerprint": "",
        "precision": MODES[mode][0],
        "counters": state.counters(engine),
        "config": {},
        "versions": {},
    }


def check_values(engine: Any, ema: Ema, checkpoint: load.Found) -> None:
    """Every value that this rank holds is the saved one, bit for bit (what is fixed: after the engine's
    cast).
    """
    reader = FragmentReader(checkpoint.folder, checkpoint.manifest)
    held = state.owned_states(engine, ("fp32", "exp_avg", "exp_avg_sq"))
    held[EMA] = ema.owned(engine)
    for fragment in state.fragments(engine):
        for name, values in held.items():
            saved = reader.whole(fragment.name, name).view(-1)[
                fragment.start : fragment.start + fragment.count
            ]
            same(values[fragment.name], saved, f"{name} of {fragment.name}")
    for piece in state.fixed(engine):
        saved = reader.whole(piece.name).view(-1).narrow(0, piece.held_start, len(piece.held))
        same(piece.held, saved.to(piece.held.dtype), piece.name)
    assert {piece.name for piece in state.fixed(engine)} >= {"centre", "counts", "blocks.0.norm1.weight"}


def same(one: Tensor, other: Tensor, what: str) -> None:
    assert torch.equal(one, other), f"{what} differs after loading"
