"""What ranks run to look at an optimizer of whole matrices: steps that are skipped."""

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig, Precision
from vitscale.engine.engine import Engine
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim import muon
from vitscale.optim.optimizers import OptimConfig

MODEL = ViTConfig(variant="Ti/4", width=48, depth=2, num_heads=3, mlp_dim=40, image_size=8, num_classes=5)


def skip(config: OptimConfig, precision: Precision, stage: int, result: Path) -> None:
    """Train, with NaN on one rank in one step. `result` gets whether that changed any state."""
    distributed.initialize()
    is_last = distributed.rank() == distributed.world_size() - 1
    plan = plan_batches(4, 0, distributed.world_size())
    engine = Engine(build_model(MODEL, 0), config, EngineConfig(zero_stage=stage), plan, precision)
    states, factors = [state_of(engine)], (1.0, 1.0, float("nan"), 1.0)
    for step, factor in enumerate(factors):
        images = torch.randn(plan.per_rank, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = (engine.forward(images).float() - 1).square().mean()
        engine.backward(loss * factor if is_last else loss)
        engine.step()
        states.append(state_of(engine))
    same = [
        before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(states[1:])
    ]
    changed = distributed.gather_json(same)
    if distributed.is_main():
        result.write_text(json.dumps(changed))
    distributed.barrier()
    engine.close()


def count(result: Path) -> None:
    """A step of Muon. `result` gets how many matrices each rank made orthogonal."""
    distributed.initialize()
    plan = plan_batches(4, 0, distributed.world_size())
    config = OptimConfig(name="muon", lr=1e-3)
    engine = Engine(build_model(MODEL, 0), config, EngineConfig(), plan, "fp32")
    original, calls = muon.orthogonal, []

    def counting(matrix: Tensor) -> Tensor:
        calls.append(matrix.shape)
        return original(matrix)

    muon.orthogonal = counting
    engine.backward(engine.forward(torch.randn(plan.per_rank, 3, 8, 8)).square().mean())
    engine.step()
    muon.orthogonal = original
    counts = distributed.gather_json(len(calls))
    if distributed.is_main():
        result.write_text(json.dumps(counts))
    distributed.barrier()
    engine.close()


def state_of(engine: Engine) -> dict[str, Tensor]:
    held = {f"{slot} {name}": values for slot, of in engine.owned().items() for name, values in of.items()}
    held |= {statistic.name: statistic.held for statistic in engine.statistics()}
    return {name: values.clone() for name, values in held.items()}
