"""The pure parts of the engine: how a batch is cut, and the DeepSpeed JSON that follows."""

import pytest

from vitscale.config import ConfigError
from vitscale.engine import EngineConfig, deepspeed_config, plan_batches


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 0), (1, 256), (4, 0), (4, 64), (64, 64), (4096, 1)]
)
def test_a_plan_gives_every_image_one_place(world_size: int, micro_batch: int) -> None:
    plan = plan_batches(4096, micro_batch, world_size)
    assert plan.world_size * plan.micro_batch * plan.grad_accum_steps == 4096
    assert micro_batch in (0, plan.micro_batch)


def test_a_batch_that_does_not_divide_is_refused_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"4096 is not a multiple of engine.micro_batch 60 x world_size 8 = 480; .* = 64"
    ):
        plan_batches(4096, 60, 8)
    with pytest.raises(
        ConfigError, match=r"global_batch 128 is not a multiple of world_size 3; start one of 1, 2, 4, .* 126"
    ):
        plan_batches(128, 0, 3)


def test_the_json_follows_from_the_plan() -> None:
    config = deepspeed_config(EngineConfig(zero_stage=3), plan_batches(64, 4, 2), "bf16", 1.0)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert config["bf16"] == {"enabled": True} and config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_extra_keys_pass_through_and_derived_ones_are_refused() -> None:
    plan = plan_batches(8, 0, 1)
    extra = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    config = deepspeed_config(EngineConfig(deepspeed_extra=extra), plan, "fp32", 0.0)
    assert config["zero_optimization"]["overlap_comm"] and config["wall_clock_breakdown"]
    for bad in ({"train_batch_size": 3}, {"zero_optimization": {"stage": 2}}):
        with pytest.raises(ConfigError, match=r"deepspeed_extra\.[\w.]+ is derived by vitscale"):
            deepspeed_config(EngineConfig(deepspeed_extra=bad), plan, "fp32", 0.0)


def test_settings_that_lose_state_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"zero_stage 0 is refused: .* wrong in bf16"):
        EngineConfig(zero_stage=0)
    with pytest.raises(ConfigError, match=r"round_robin_gradients is refused"):
        EngineConfig(deepspeed_extra={"zero_optimization": {"round_robin_gradients": True}})
