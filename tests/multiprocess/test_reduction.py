"""Gradients in bf16: summed over ranks and micro steps in fp32, whatever the layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from multiprocess.reduction import NUM_PARAMS, measure
from multiprocess.zygote import Zygote

from vitscale.plan.formulas import Communication, communication

# By default, ZeRO 3 does not cut what is as small as the parameters here, and gathers it once.
CUT = {"stage3_param_persistence_threshold": 0}
REGATHERED = CUT | {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}


def engine(stage: int, **options: Any) -> dict[str, Any]:
    """A section [engine]."""
    extra = {"zero_optimization": CUT} if stage == 3 else {}
    return {"zero_stage": stage, "deepspeed_extra": extra, **options}


def measured(
    zygote: Zygote, folder: Path, world_size: int, accumulation: int, engines: dict[str, dict[str, Any]]
) -> dict[str, tuple[float, dict[str, int]]]:
    """Error of the gradient and elements sent by precision, by the engine's name."""
    log = folder / "log"
    statuses = zygote.run(world_size, measure, folder, accumulation, engines, log=log)
    assert statuses == [0] * world_size, log.read_text()
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in engines}


def test_the_mean_gradient_of_four_ranks_is_exact_and_costs_what_is_planned(
    tmp_path: Path, zygote: Zygote
) -> None:
    accumulation = 3
    planned = {str(stage): communication(NUM_PARAMS, stage, accumulation) for stage in (1, 2, 3)}
    engines = {stage: engine(int(stage)) for stage in planned}
    engines["offloaded"] = engine(1, offload_optimizer=True)
    planned["offloaded"] = planned["1"]
    engines["regathered"] = engine(3, deepspeed_extra={"zero_optimization": REGATHERED})
    planned["regathered"] = Communication(planned["3"].gradients, 2 * accumulation * NUM_PARAMS)
    for name, (error, sent) in measured(zygote, tmp_path, 4, accumulation, engines).items():
        assert error < 1e-7, name
        # Cuts are padded, and flags and norms travel, too.
        assert sent["torch.float32"] == pytest.approx(planned[name].gradients, rel=1e-3), name
        assert sent["torch.bfloat16"] == pytest.approx(planned[name].weights, rel=1e-3), name


def test_reduced_in_bf16_it_loses_bits_and_costs_half(tmp_path: Path, zygote: Zygote) -> None:
    engines = {str(stage): engine(stage, reduce_precision="bf16") for stage in (1, 2, 3)}
    for name, (error, sent) in measured(zygote, tmp_path, 4, 1, engines).items():
        planned = communication(NUM_PARAMS, int(name), 1)
        assert 1e-3 < error < 1e-2, name
        assert sent["torch.bfloat16"] == pytest.approx(planned.gradients + planned.weights, rel=1e-3), name


def test_a_rank_alone_keeps_what_it_accumulates(tmp_path: Path, zygote: Zygote) -> None:
    engines = {precision: engine(1, reduce_precision=precision) for precision in ("fp32", "bf16")}
    found = measured(zygote, tmp_path, 1, 4, engines)
    assert found["fp32"][0] < 1e-7
    assert found["bf16"][0] > 1e-3  # DeepSpeed casts there, too
