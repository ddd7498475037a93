"""Ranks that write checkpoints at every ZeRO stage and precision, and ranks that read them.

The model has all that a checkpoint must hold: two parameter groups, frozen parameters, a buffer
of floats and one of integers, and an average of the weights. Parameters of one value and of odd
sizes are cut unevenly among the ranks.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.checkpoint import load, snapshot
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import TrainState
from vitscale.checkpoint.store import Home
from vitscale.checkpoint.verify import Checkpoint
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import OptimConfig, freeze

STAGES = (1, 2, 3)
GLOBAL_BATCH = 12
MODEL = ViTConfig(variant="Ti/4", width=12, depth=2, num_heads=3, mlp_dim=19, image_size=8, num_classes=1)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5, freeze=("blocks.0.*",), ema_decay=0.9)
MODES = {  # precision, what differs in [engine]
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "offload": ("fp32", {"offload_optimizer": True}),
}


def name_of(mode: str, stage: int, world_size: int) -> str:
    """The name of a layout, and of the checkpoint that it writes."""
    return f"{mode}-zero{stage}-world{world_size}"


def write(folder: Path, modes: Sequence[str]) -> None:
    """Train two steps at every stage, save, and note the losses of the next two steps."""
    distributed.initialize()
    for mode in modes:
        for stage in STAGES:
            engine = make_engine(mode, stage, seed=1)
            for step in range(2):
                train_step(engine, step)
            home = Home(folder / name_of(mode, stage, distributed.world_size()))
            snapshot.write(snapshot.take(engine, train_state(mode), None), home)
            losses = [train_step(engine, step) for step in (2, 3)]
            if distributed.is_main():
                (home.directory / "losses.json").write_text(json.dumps(losses))
            distributed.barrier()
            engine.close()


def read(folder: Path, modes: Sequence[str], pairs: Collection[tuple[str, str]], result: Path) -> None:
    """Restore checkpoints of `folder` into one engine of each stage and mode.

    pairs: which of them, as (writer, reader) of name_of. Every value is checked. `result` gets
    the losses of the next two steps, as [writer, reader, losses].
    """
    distributed.initialize()
    rows: list[tuple[str, str, list[float]]] = []
    for mode in modes:
        for stage in STAGES:
            reader = name_of(mode, stage, distributed.world_size())
            engine = make_engine(mode, stage, seed=2)
            for path in sorted(folder.iterdir()):
                if (path.name, reader) in pairs:
                    checkpoint = load.find(Home(path))
                    assert checkpoint
                    load.resume(engine, checkpoint)
                    check_values(engine, checkpoint)
                    losses = [train_step(engine, step) for step in (2, 3)]
                    rows.append((path.name, reader, losses))
            engine.close()
    if distributed.is_main():
        result.write_text(json.dumps(rows))


def make_engine(mode: str, stage: int, seed: int) -> Engine:
    precision, options = MODES[mode]
    model = build_model(MODEL, seed)
    model.register_buffer("centre", torch.randn(5, generator=torch.Generator().manual_seed(seed)))
    model.register_buffer("counts", torch.arange(7) + (1 << 40) * seed)
    with torch.no_grad():  # a head of zeros would hide what is behind it
        model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    freeze(model, OPTIM.freeze)
    plan = plan_batches(GLOBAL_BATCH, 0, distributed.world_size())
    return Engine(model, OPTIM, EngineConfig(zero_stage=stage, **options), plan, precision)


def train_step(engine: Engine, step: int) -> float:
    """One step on this rank's part of the batch. Returns the loss of the whole batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
    targets = torch.randn(GLOBAL_BATCH, 1, generator=generator)
    each = GLOBAL_BATCH // distributed.world_size()
    mine = slice(distributed.rank() * each, (distributed.rank() + 1) * each)
    outputs = engine.forward(images[mine]).float()
    loss = (outputs - targets[mine]).square().mean()
    engine.backward(loss)
    engine.step()
    return distributed.all_reduce_sum([loss.item()])[0] / distributed.world_size()


def train_state(mode: str) -> TrainState:
    return TrainState(
        step=2,
        data_step=2,
        samples_seen=0,
        bad_samples=0,
        steps_per_epoch=0,
        data_fingerprint="",
        decoder="",
        precision=MODES[mode][0],
        config={},
        versions={},
    )


def check_values(engine: Engine, checkpoint: Checkpoint) -> None:
    """Every value of this rank is the saved one, bit for bit, untrained ones after a cast."""
    reader = FragmentReader(checkpoint.folder, checkpoint.manifest)
    owned = engine.owned()
    assert set(owned) == {"fp32", "exp_avg", "exp_avg_sq", "ema"}
    for fragment in engine.fragments():
        for slot, values in owned.items():
            saved = reader.whole(fragment.name, slot).view(-1).narrow(0, fragment.start, fragment.count)
            same(values[fragment.name], saved, f"{slot} of {fragment.name}")
    for tensor in engine.untrained():
        saved = reader.whole(tensor.name).view(-1).narrow(0, tensor.held_start, len(tensor.held))
        same(tensor.held, saved.to(tensor.held.dtype), tensor.name)
    assert {tensor.name for tensor in engine.untrained()} >= {"centre", "counts", "blocks.0.norm1.weight"}


def same(one: Tensor, other: Tensor, what: str) -> None:
    assert torch.equal(one, other), f"{what} differs after loading"
