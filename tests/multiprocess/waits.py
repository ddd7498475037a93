"""Where a program waits for its device, on which kernels of a GPU then wait in turn."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from multiprocess.reduction import MICRO_BATCH, MODEL, made
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale import distributed
from vitscale.data.transforms import AugmentConfig
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine
from vitscale.engine.norms import StepNorms
from vitscale.objectives import build_objective
from vitscale.objectives.classification import ClassificationConfig
from vitscale.objectives.losses import LossConfig
from vitscale.objectives.objective import BatchKey
from vitscale.optim.optimizers import OptimConfig

# Operations that hand a value of a tensor to the program. On a CPU, tolist() is none.
READS = ("_local_scalar_dense", "equal")
# DeepSpeed makes -1 there for a norm that is not finite, and torch reads it to fill it in.
CONSTANT = "mask_nan_or_inf_with_val_inplace"
TORCH = str(Path(torch.__file__).parent)


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """The functions that wait for the device within the block; of a CPU, those that read it."""
    places: list[str] = []
    if distributed.device().type == "cpu":
        with _Reads(places):
            yield places
        return

    def note(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):  # not that the mode is a prototype
            places.append(_function())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _Reads(TorchDispatchMode):
    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            self.places.append(_function())
        return function(*args, **(kwargs or {}))


def _function() -> str:
    """The innermost function that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or _is_torch(frame.f_code.co_filename)):
        frame = frame.f_back
    return frame.f_code.co_name


def _is_torch(path: str) -> bool:
    return path.startswith(TORCH) or path == warnings.__file__


def step_waits_for_the_norm(compile: bool) -> None:
    """A step in bf16 waits for the gradient's norm alone: to skip the step, and to clip."""
    distributed.initialize()
    for accumulation, clip_norm in ((1, 1.0), (2, 1.0), (1, 0.0)):
        places = step_waits(compile, accumulation, clip_norm)
        expected = ["is_invalid_grad_norm", *(["clip_tensors_by_global_norm"] if clip_norm else [])]
        assert [place for place in places if place != CONSTANT] == expected, places
        assert places.count(CONSTANT) <= 2, places


def step_waits(compile: bool, accumulation: int, clip_norm: float) -> list[str]:
    """The functions in which the second step waits."""
    optim = OptimConfig(weight_decay=0.1, clip_norm=clip_norm)
    plan = plan_batches(accumulation * MICRO_BATCH, MICRO_BATCH, 1)
    engine = Engine(made(), optim, EngineConfig(compile=compile), plan, "bf16")
    objective = build_objective(
        ClassificationConfig(), loss=LossConfig(), augment=AugmentConfig(), model=MODEL
    )
    device = distributed.device()
    images = torch.randint(256, (MICRO_BATCH, 3, 8, 8), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (MICRO_BATCH, 1), device=device)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(objective.loss(engine.forward, images, labels, BatchKey(0, 1, 0)))
            engine.step()

    step()
    with waits() as places:
        step()
    engine.close()
    return places


def norms_wait_a_few_times() -> None:
    """log.norms does not wait for each parameter, of which there are some 400 in a ViT-H."""
    distributed.initialize()
    optim, plan = OptimConfig(weight_decay=0.1, clip_norm=1.0), plan_batches(MICRO_BATCH, MICRO_BATCH, 1)
    images = torch.ones(MICRO_BATCH, 3, 8, 8, device=distributed.device())
    for stage in (1, 2, 3):
        engine = Engine(made(), optim, EngineConfig(zero_stage=stage), plan, "bf16")
        with waits() as before:
            norms = StepNorms(engine, optim)
        engine.backward(engine.forward(images).square().mean())
        engine.step()
        with waits() as after:
            assert norms.read()
        assert len(before) <= 1 and len(after) <= 4, (stage, before, after)
        engine.close()
