"""What the ranks of test_start.py do: start as a run does, and count what memory it takes."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitscale import config as configs
from vitscale import distributed, start
from vitscale.bench import ranks
from vitscale.checkpoint.store import Home
from vitscale.engine.engine import Engine
from vitscale.job import prepare
from vitscale.models import build_model, empty_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import freeze
from vitscale.train_config import TrainConfig


def measure(config: Path, overrides: Sequence[str], out: Path) -> None:
    """Start a run, without a step of it.

    OUT-RANK.json gets the bytes of the model in fp32, and the most that it held at a time.
    """
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config], overrides)
    job = prepare(loaded, distributed.world_size())
    home = Home.of(loaded.run_dir, loaded.checkpoint)
    with Held() as held:
        engine, *_ = start.start(job, home)
    model_bytes = 4 * sum(map(math.prod, engine.shapes().values()))
    Path(f"{out}-{distributed.rank()}.json").write_text(json.dumps([model_bytes, held.peak]))


def note_programs(config: Path, out: Path) -> None:
    """Start a run; OUT gets the programs it started, and torch's compiler if it imported it."""
    programs: list[str] = []
    sys.addaudithook(
        lambda event, values: programs.append(str(values[0])) if event == "subprocess.Popen" else None
    )
    distributed.initialize()
    job = prepare(configs.load(TrainConfig, [config]), distributed.world_size())
    start.start(job, Home.of(job.config.run_dir, job.config.checkpoint))
    compiler = {"torch._inductor.compile_fx"} & sys.modules.keys()
    out.write_text(json.dumps([*programs, *compiler]))


def count_reads(config: Path, overrides: Sequence[str], out: Path) -> None:
    """Start a run; OUT-RANK.json gets how often the rank read values of a checkpoint."""
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config], overrides)
    job = prepare(loaded, distributed.world_size())
    reads = 0

    def profile(_: FrameType, event: str, called: Any) -> None:
        nonlocal reads
        reads += event == "c_call" and called.__name__ == "preadv"

    sys.setprofile(profile)
    start.start(job, Home.of(loaded.run_dir, loaded.checkpoint))
    sys.setprofile(None)
    Path(f"{out}-{distributed.rank()}.json").write_text(json.dumps(reads))


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that this thread makes and somebody still holds.

    peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return made


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


def note_pieces(variant: str, out: Path) -> None:
    """OUT-STAGE-RANK.json gets the (name, start, count) of what a rank owns at each stage."""
    distributed.initialize()
    for stage in (1, 2, 3):
        engine = ranks.make_engine(ViTConfig(variant=variant), stage)
        pieces = [(fragment.name, fragment.start, fragment.count) for fragment in engine.fragments()]
        Path(f"{out}-{stage}-{distributed.rank()}.json").write_text(json.dumps(pieces))
        engine.close()
