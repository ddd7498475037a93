"""What is measured on a GPU by test_gpu.py, and on a CPU by test_devices.py."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from multiprocess.optimizers import orthogonal as by_singular_values
from multiprocess.reduction import MICRO_BATCH, deterministic, made, micro_batch, step
from multiprocess.waits import norms_wait_a_few_times
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

from vitscale import distributed
from vitscale.bench import step as bench
from vitscale.bench.step import RETRIES, Case, StepBench
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.muon import SCALE, orthogonal
from vitscale.optim.optimizers import OptimConfig
from vitscale.system import hardware

OPTIM = OptimConfig(weight_decay=0.1, clip_norm=1.0)
SHAPES = [(768, 192), (192, 768), (384, 384)]


def held_bytes() -> int:
    """Bytes of the tensors that live; on a CPU, of those that the program has."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = [value.untyped_storage() for value in gc.get_objects() if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_is_steady(engines: Sequence[dict[str, Any]]) -> None:
    """A step in bf16 leaves nothing behind that only the garbage collector would find."""
    distributed.initialize()
    plan = plan_batches(2 * MICRO_BATCH, MICRO_BATCH, 1)
    for options in engines:
        engine, held = Engine(made(), OPTIM, EngineConfig(**options), plan, "bf16"), []
        gc.disable()
        for number in range(1, 9):
            step(engine, 2)
            if number in (3, 8):
                held.append(held_bytes())
        gc.enable()
        # On a CPU, a scalar may be seen one time and not the other.
        assert abs(held[0] - held[1]) < 16 < held[0], (options, held)
        engine.close()


def masters(engine: Engine) -> dict[str, Tensor]:
    return {name: master.clone() for name, master in engine.owned()["fp32"].items()}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def nan_step_changes_nothing() -> None:
    """A step with NaN in bf16 is skipped, and the next is as if it had not been."""
    distributed.initialize()
    deterministic()
    images, labels = micro_batch(0, 0)
    plan = plan_batches(MICRO_BATCH, MICRO_BATCH, 1)

    def train(engine: Engine, factor: float) -> None:
        engine.backward(factor * cross_entropy(engine.forward(images).float(), labels))
        engine.step()

    for stage in (1, 2, 3):
        ended = []
        for spoiled in (True, False):
            engine = Engine(made(), OPTIM, EngineConfig(zero_stage=stage), plan, "bf16")
            before = masters(engine)
            if spoiled:
                train(engine, float("nan"))
                assert engine.counters.skipped_steps == 1 and not differ(before, masters(engine)), stage
            train(engine, 1.0)
            ended.append(masters(engine))
            assert differ(before, ended[-1]), stage
            engine.close()
        assert not differ(*ended), (stage, differ(*ended))


def changed_weight_is_found() -> None:
    """A live weight that is not the cast of its master is refused by name, at every stage."""
    distributed.initialize()
    plan = plan_batches(MICRO_BATCH, MICRO_BATCH, 1)
    for stage in (1, 2, 3):
        engine = Engine(made(), OPTIM, EngineConfig(zero_stage=stage), plan, "bf16")
        engine.owned()
        fragment = list(engine.fragments())[-1]
        live: Any = fragment.param.ds_tensor if stage == 3 else fragment.param
        live.data.view(-1)[-1] += 1
        with pytest.raises(RuntimeError, match=f"the map of ZeRO fragments is wrong for {fragment.name}: "):
            engine.owned()
        engine.close()


def bench_tells_retries() -> None:
    """Each row of a bench on a GPU says how often the allocator retried; there is room here."""
    model = ViTConfig(variant="mu/16", image_size=32, num_classes=10)
    cases = Case(loop="vitscale"), Case(loop="plain")
    results = bench.run(StepBench(model=model, batch=2, cases=cases, rounds=1, steps=1), lambda _: None)
    for case in cases:
        assert results[str(case)]["images/s"] > 0
        assert results[str(case)].get(RETRIES) == (0 if torch.cuda.is_available() else None)


def conv_error(device: str, tf32: bool) -> float:
    """Of a convolution of 256 channels in fp32, relative to that in fp64."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 256, 8, 8, generator=generator).to(device)
    kernel = torch.randn(256, 256, 3, 3, generator=generator).to(device)
    hardware.allow_tf32(tf32)
    try:
        return relative_error(conv2d(maps, kernel), conv2d(maps.double(), kernel.double()))
    finally:
        hardware.allow_tf32(False)


def orthogonal_error(device: str, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Of what Muon makes of a matrix, relative to that of its singular values in fp64."""
    hardware.allow_tf32(False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = SCALE * max(shape) ** 0.5 * orthogonal(matrix.to(device)).double().cpu()
    return relative_error(made, by_singular_values(matrix).double())


def relative_error(values: Tensor, exact: Tensor) -> float:
    return ((values.double() - exact).norm() / exact.norm()).item()


# Each runs on one rank, without arguments.
CHECKS = (
    nan_step_changes_nothing,
    changed_weight_is_found,
    norms_wait_a_few_times,
    bench_tells_retries,
)
