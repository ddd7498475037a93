"""What the ranks of test_start.py do: start as a run does, and count what memory it takes."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vitscale import config as configs
from vitscale import distributed
from vitscale import train as training
from vitscale.checkpoint.store import Home
from vitscale.engine import zero
from vitscale.engine.engine import DTYPES, Engine
from vitscale.job import prepare
from vitscale.models import build_model, empty_model
from vitscale.optim import freeze
from vitscale.train_config import TrainConfig


def measure(config: Path, overrides: Sequence[str], out: Path) -> None:
    """Start a run, without a step of it.

    OUT-RANK.json gets the bytes of the model in fp32, and the most that torch held at a time
    beyond what it held before.
    """
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config], overrides)
    job = prepare(loaded, distributed.world_size())
    home = Home.of(loaded.run_dir, loaded.checkpoint)
    engines: list[Engine] = []
    peak = peak_bytes(lambda: engines.append(training.start(job, home)[0]))
    model_bytes = 4 * sum(map(math.prod, engines[0].shapes().values()))
    Path(f"{out}-{distributed.rank()}.json").write_text(json.dumps([model_bytes, peak]))


def peak_bytes(action: Callable[[], object]) -> int:
    """The most bytes of CPU memory that torch allocated at a time during an action."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check_values(config: Path, overrides: Sequence[str]) -> None:
    """An allocated and filled engine has the values of one that was given the whole model."""
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config], overrides)
    job = prepare(loaded, distributed.world_size())
    whole = build_model(loaded.model, seed=3)
    values = {name: param.detach().clone() for name, param in whole.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in whole.named_buffers()}
    model = empty_model(loaded.model)
    freeze(model, loaded.optim.freeze)
    zero.allocate(model, job.deepspeed_config, DTYPES[loaded.precision])
    engine = Engine(model, loaded.optim, loaded.engine, job.plan, loaded.precision)
    engine.fill(empty_model(loaded.model).initial_values(seed=3))
    owned, seen = engine.owned(), set()
    for fragment in engine.fragments():
        expected = values[fragment.name].flatten()[fragment.start : fragment.start + fragment.count]
        for slot in owned.values():
            assert torch.equal(slot[fragment.name], expected), fragment.name
        seen.add(fragment.name)
    for tensor in engine.untrained():
        expected = values[tensor.name].flatten()[tensor.held_start : tensor.held_start + len(tensor.held)]
        assert torch.equal(tensor.held, expected.to(tensor.held.dtype)), tensor.name
        seen.add(tensor.name)
    everywhere = {name for names in distributed.gather_json(sorted(seen)) for name in names}
    assert everywhere == set(values)
    for name, buffer in engine.module.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, buffers[name]), name
    freeze(whole, loaded.optim.freeze)
    other = Engine(whole, loaded.optim, loaded.engine, job.plan, loaded.precision)
    images = torch.randn(2, 3, loaded.model.image_size, loaded.model.image_size)
    with torch.no_grad(), engine.evaluating(), other.evaluating():
        assert torch.equal(engine.forward(images), other.forward(images))
