"""`tools/bench.py step`: images per second of a training step, beside a plain PyTorch loop.

One process on one device trains on random images that are on the device already, so that the
step alone is measured: normalisation, forward, backward, clipping and update. Every case is
built and warmed up once; then they are measured in turns, and each figure is the median of the
rounds. All are in memory until then. A case that has no room beside the others is measured
again when they are closed, and its row says so.

The baselines are the same model in a loop of plain PyTorch (autocast, fused AdamW), and timm's
model of the same size in that loop, where timm is installed.
"""

import dataclasses
import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from vitscale import distributed
from vitscale.bench import device
from vitscale.config import positive, to_dict
from vitscale.data.transforms import AugmentConfig, normalize
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig, Precision
from vitscale.engine.engine import DTYPES, Engine
from vitscale.image_size import pixels, sides
from vitscale.models import ModelConfig, build_model
from vitscale.models.compiled import check_cache
from vitscale.models.flops import train_flops
from vitscale.models.layers import Checkpointing
from vitscale.models.model import Model
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives import build_objective
from vitscale.objectives.classification import ClassificationConfig
from vitscale.objectives.losses import LossConfig, compute_loss, to_targets
from vitscale.objectives.objective import BatchKey
from vitscale.optim.optimizers import OptimConfig, build_optimizer
from vitscale.plan.speed import row_name
from vitscale.system.hardware import lacks_memory, peak_flops

# Kinds of blocks of a model, at most: two of each stage of a ResNet. Each is a graph.
MAX_GRAPHS = 8
CLIP_NORM = 1.0
OPTIM = OptimConfig(weight_decay=0.1, clip_norm=CLIP_NORM)
WARMUP_STEPS = 3
# In a row: each costs time in the rounds, so that another number than 0 spoils the figures.
RETRIES = "allocator retries in the rounds"
# timm's names of the paper's models, and of the tiny ones below them.
TIMM_NAMES = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
Loop = Literal["vitscale", "plain", "timm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: who trains, and how."""

    loop: Loop
    compile: bool = False
    checkpointing: Checkpointing = "none"

    def __str__(self) -> str:
        return row_name(self.loop, self.checkpointing, compiled=self.compile)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBench:
    """What is measured.

    model: of any kind that vitscale trains.
    batch: images of a step, on the one device.
    precision: of the forward and backward pass.
    cases: the rows of the table.
    rounds, steps: each figure is the median of the rounds, each of so many steps.
    """

    model: ModelConfig = dataclasses.field(default_factory=ViTConfig)
    batch: int = 256
    precision: Precision = "bf16"
    cases: tuple[Case, ...]
    rounds: int = 5
    steps: int = 5

    def __post_init__(self) -> None:
        positive("", **{"--rounds": self.rounds, "--steps": self.steps, "--batch": self.batch})


def every_case(model: ModelConfig) -> tuple[Case, ...]:
    """Each recomputation policy with and without compilation, and the baselines."""
    compiled, policies = (False, True), get_args(Checkpointing)
    baselines: tuple[Loop, ...] = ("plain", "timm") if timm_has(model) else ("plain",)
    ours = [Case(loop="vitscale", compile=c, checkpointing=policy) for policy in policies for c in compiled]
    return (*ours, *(Case(loop=loop, compile=c) for loop in baselines for c in compiled))


@runtime_checkable
class Trainee(Protocol):
    """What is measured: a step on a micro batch."""

    def step(self, images: Tensor, labels: Tensor) -> None: ...

    def close(self) -> None: ...


class Ours:
    """A step of vitscale's engine and objective, as the training loop makes it."""

    def __init__(self, config: StepBench, case: Case) -> None:
        engine = EngineConfig(activation_checkpointing=case.checkpointing, compile=case.compile)
        plan = plan_batches(config.batch, 0, 1)
        self.engine = Engine(build_model(config.model, seed=0), OPTIM, engine, plan, config.precision)
        self.objective = build_objective(
            ClassificationConfig(),
            loss=LossConfig(),
            augment=AugmentConfig(),
            model=config.model,
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        loss = self.objective.loss(self.engine.forward, images, labels, BatchKey(0, 1, 0))
        self.engine.backward(loss)
        self.engine.step()

    def close(self) -> None:
        self.engine.close()


class Plain:
    """The same step as a dozen lines of PyTorch."""

    def __init__(self, config: StepBench, case: Case) -> None:
        self.device = distributed.device()
        self.num_classes, self.dtype = config.model.num_classes, DTYPES[config.precision]
        model = config.model
        if case.loop == "timm" and isinstance(model, ViTConfig):
            network = timm_model(model)
        else:
            network = build_model(model, seed=0)
        self.network: nn.Module = network.to(self.device)
        self.optimizer = build_optimizer(OPTIM, self.network)
        if case.compile and isinstance(network, Model):
            network.compile_blocks()
        elif case.compile:  # by block, as vitscale does it
            check_cache()
            for block in self.network.get_submodule("blocks").children():
                block.compile(dynamic=False)

    def step(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network(normalize(images, torch.float32))
        compute_loss(LossConfig(), logits, to_targets(labels, self.num_classes)).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Nothing to free but the memory."""


def timm_has(model: ModelConfig) -> bool:
    """Whether timm can be imported, and has this model under a name."""
    if not isinstance(model, ViTConfig) or model.kind != "vit":
        return False
    plain = ViTConfig(
        variant=model.variant, image_size=model.image_size, num_classes=model.num_classes, pool=model.pool
    )
    installed = all(importlib.util.find_spec(name) for name in ("timm", "torchvision"))
    return installed and model == plain and model.variant in TIMM_NAMES


def timm_model(config: ViTConfig) -> nn.Module:
    import timm

    pool = {"token": "token", "mean": "avg", "map": "map"}[config.pool]
    return timm.create_model(
        TIMM_NAMES[config.variant],
        img_size=config.image_size,
        num_classes=config.num_classes,
        global_pool=pool,
        class_token=config.pool == "token",
    )


def run(config: StepBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every case on this device."""
    distributed.initialize()
    torch._dynamo.reset()
    # The graphs of all cases count as recompilations of the same code. At its limit torch runs
    # what is left eagerly.
    limit = MAX_GRAPHS * len(config.cases)
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        return measure(config, functools.partial(_build, config), progress)


def _build(config: StepBench, case: Case) -> Trainee:
    return Ours(config, case) if case.loop == "vitscale" else Plain(config, case)


def measure(
    config: StepBench, build: Callable[[Case], Trainee], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the cases in turns, and then each alone that had no room beside the others."""
    where = distributed.device()
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch, 3, *sides(config.model.image_size))
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(where)
    labels = torch.randint(config.model.num_classes, (config.batch, 1), generator=generator).to(where)
    turns = _Turns(config, build, images, labels, progress)
    together = turns.measure(config.cases)
    alone: dict[Case, list[float]] = {}
    for case in config.cases:
        if case not in together and len(config.cases) > 1:
            alone |= turns.measure((case,))
    return _results(config, turns.rows, together, alone)


@dataclasses.dataclass
class _Turns:
    """Measures cases in turns, all of which are in memory.

    rows: what the table says of each case so far.
    """

    config: StepBench
    build: Callable[[Case], Trainee]
    images: Tensor
    labels: Tensor
    progress: Callable[[str], None]
    rows: dict[Case, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measure(self, cases: Sequence[Case]) -> dict[Case, list[float]]:
        """Seconds of a step in each round, of the cases that memory was enough for."""
        device.free()
        title, trainees = self.config.model.title, dict[Case, Trainee]()
        for case in cases:
            self.progress(f"{title}: warming up {case}")
            self._within_memory(trainees, case, self._warm_up)
        seconds: dict[Case, list[float]] = {case: [] for case in trainees}
        for round in range(self.config.rounds):
            for case in list(trainees):
                self.progress(f"{title}: round {round + 1}, {case}")
                self._within_memory(trainees, case, functools.partial(self._time, seconds))
        for trainee in trainees.values():
            trainee.close()
        return {case: seconds[case] for case in trainees}

    def _warm_up(self, trainees: dict[Case, Trainee], case: Case) -> None:
        with _Peak() as peak:
            began = time.perf_counter()
            trainees[case] = self.build(case)
            for _ in range(WARMUP_STEPS):
                trainees[case].step(self.images, self.labels)
            device.wait()
            self.rows[case] = {"start and warm-up, seconds": time.perf_counter() - began}
        if peak.bytes:
            self.rows[case]["peak memory, GiB"] = peak.bytes / 2**30
            self.rows[case][RETRIES] = 0

    def _time(
        self, seconds: Mapping[Case, list[float]], trainees: Mapping[Case, Trainee], case: Case
    ) -> None:
        """Add the seconds of a step in one round, and to the row what the allocator retried."""
        retries = _num_retries()
        device.wait()
        began = time.perf_counter()
        for _ in range(self.config.steps):
            trainees[case].step(self.images, self.labels)
        device.wait()
        seconds[case].append((time.perf_counter() - began) / self.config.steps)
        if RETRIES in self.rows[case]:
            self.rows[case][RETRIES] += _num_retries() - retries

    def _within_memory(
        self, trainees: dict[Case, Trainee], case: Case, action: Callable[[dict[Case, Trainee], Case], None]
    ) -> None:
        """Act on a case. One that has no memory for it is noted, closed and freed."""
        try:
            action(trainees, case)
            return
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
        # Not within `except`, where the traceback holds what the action had.
        self.rows[case] = {"failed": "out of memory"}
        if case in trainees:  # else it could not even be built
            trainees.pop(case).close()
        device.free()


def _num_retries() -> int:
    """How often the allocator has had to free its cache before it got memory; 0 on a CPU."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0)


class _Peak:
    """The most memory that a block held at once on a GPU, beside what was held before it."""

    bytes = 0

    def __enter__(self) -> "_Peak":
        gc.collect()  # an engine that was closed has cycles: it would count as what was held before
        if torch.cuda.is_available():
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def _results(
    config: StepBench,
    rows: Mapping[Case, dict[str, Any]],
    together: Mapping[Case, list[float]],
    alone: Mapping[Case, list[float]],
) -> dict[str, Any]:
    """The table: each case beside the plain loop that is compiled, or not, as it is.

    together, alone: seconds of a step in each round. Those measured alone are compared with
    nothing.
    """
    seconds = {**together, **alone}
    peak = peak_flops() if config.precision != "fp32" else 0.0
    results: dict[str, Any] = {
        "model": f"{config.model.title} at {pixels(config.model.image_size)}",
        "config": to_dict(config.model),
        "device": device.name(),
        "precision": config.precision,
        "images of a step": config.batch,
    }
    if peak:
        results["peak of the device, TFLOP/s"] = peak / 1e12
    for case, row in rows.items():
        figures: dict[str, Any] = {}
        if case in seconds:
            figures["images/s"] = speed = config.batch / median(seconds[case])
            figures["slowest to fastest round"] = max(seconds[case]) / min(seconds[case])
            if peak:
                figures["MFU, %"] = 100 * speed * train_flops(config.model) / peak
            plain = Case(loop="plain", compile=case.compile)
            if case != plain and {case, plain} <= together.keys():
                pairs = zip(together[plain], together[case], strict=True)
                figures["speed / plain loop"] = median(other / own for other, own in pairs)
            if case in alone:
                figures["measured"] = "alone: beside the others, memory ran out"
        results[str(case)] = figures | row
    return results
