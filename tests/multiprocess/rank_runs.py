"""What forked ranks run besides a plain run: evaluations, and runs that note something."""

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from multiprocess.hooks import at_batch, rank
from multiprocess.ranks import Event, train

from tools.evaluate import main as evaluate_main
from vitscale import config as configs
from vitscale import distributed
from vitscale.engine.batches import plan_batches
from vitscale.engine.engine import Engine
from vitscale.guard.health import Health
from vitscale.models import build_model
from vitscale.train import train as train_config
from vitscale.train_config import TrainConfig


def train_in(folder: Path, config: Path, overrides: Sequence[str], event: Event | None = None) -> int:
    """A run whose paths are relative to a folder."""
    os.chdir(folder)
    return train(config, overrides, event)


def evaluate(arguments: Sequence[str]) -> int:
    """An evaluation, as tools/evaluate.py makes it."""
    return evaluate_main(arguments)


def note_seeds(config: Path, overrides: Sequence[str], folder: Path) -> int:
    """A run; FOLDER gets the seeds with which the forward passes of each rank begin."""
    seeds = list[int]()
    forward = Engine.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        seeds.append(torch.initial_seed())
        return forward(*arguments, **options)

    Engine.forward = noted  # type: ignore[method-assign]
    status = train(config, overrides)
    (folder / f"seeds-{rank()}.json").write_text(json.dumps(seeds))
    return status


def train_and_note(config: Path, overrides: Sequence[str], out: Path) -> int:
    """A run; OUT gets what is on in step 2: TF32 of matmuls and of convolutions, and gc."""

    def note() -> None:
        tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
        out.write_text(json.dumps([*tf32, gc.isenabled()]))

    at_batch(2, note)
    return train(config, overrides)


def train_and_note_files(config: Path, overrides: Sequence[str], folder: Path, out: Path) -> int:
    """A run; OUT.RANK gets how many bytes of files of `folder` are in its memory in step 2."""

    def note() -> None:
        sizes = [
            int(end, 16) - int(start, 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if f"{folder}/" in line
            for start, end in [line.split()[0].split("-")]
        ]
        out.with_suffix(f".{distributed.rank()}").write_text(json.dumps(sizes))

    at_batch(2, note)
    return train(config, overrides)


def train_apart(config: Path, run_dir: Path, overrides: Sequence[str] = ()) -> int:
    """A run whose ranks share no disk: each has a run directory of its own, RUN_DIR-RANK."""
    return train(config, [f"run_dir={run_dir}-{rank()}", *overrides])


def train_twice(first: Path, second: Path) -> int:
    """Two runs in one process, one after the other, and then the first again, which is done."""
    distributed.initialize()
    for config in (first, second, first):
        status = train_config(configs.load(TrainConfig, [config]))
        assert status == 0, status
    return 0


def watch_health(config: Path, out: Path) -> None:
    """What Health says after a step on two ranks whose losses are given; OUT-RANK.json.

    One after another: sound, not finite on rank 1 alone, sound again.
    """
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config])
    plan = plan_batches(loaded.global_batch, loaded.engine.micro_batch, distributed.world_size())
    engine = Engine(build_model(loaded.model, seed=0), loaded.optim, loaded.engine, plan, "fp32")
    health, said = Health(engine, limit=10), []
    for value in (1.0, float("nan") if rank() else 1.0, 1.0):
        images = torch.zeros(plan.micro_batch, 3, loaded.model.image_size, loaded.model.image_size)
        for _ in range(plan.grad_accum_steps):
            engine.backward(engine.forward(images).square().mean())
            engine.step()
        health.add(torch.tensor(value))
        said.append(health.since_last_save())
    Path(f"{out}-{rank()}.json").write_text(json.dumps(said))
