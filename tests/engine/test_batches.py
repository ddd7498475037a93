"""The pure parts of the engine: how a batch is cut, and the DeepSpeed JSON it leads to."""

import contextlib
from typing import Any

import pytest

from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig, Precision, check_compiled, make_ds_config
from vitscale.errors import ConfigError
from vitscale.models.vit_config import ViTConfig


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 0), (1, 256), (4, 0), (4, 64), (64, 64), (4096, 1)]
)
def test_a_plan_gives_every_image_one_place(world_size: int, micro_batch: int) -> None:
    plan = plan_batches(4096, micro_batch, world_size)
    assert plan.world_size * plan.micro_batch * plan.grad_accum_steps == 4096
    assert micro_batch in (0, plan.micro_batch)


@pytest.mark.parametrize(
    ("refused", "message", "accepted"),
    [
        (
            (4096, 60, 8),
            r"4096 is not a multiple of engine.micro_batch 60 x world_size 8 = 480; .* = 64",
            (4096, 64, 8),
        ),
        (
            (128, 0, 3),
            r"global_batch 128 is not a multiple of world_size 3; start one of 1, 2, 4, .* 126",
            (126, 0, 3),
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(
    refused: tuple[int, int, int], message: str, accepted: tuple[int, int, int]
) -> None:
    plan_batches(*accepted)
    with pytest.raises(ConfigError, match=message):
        plan_batches(*refused)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "way_out"),
    [
        (128, 0, 3, "start one of 1, 2, 4, 8, 16, 32, 64, 128 processes, or use global_batch = 126"),
        (5040, 0, 11, "start one of 1, 2, 3, 4, 5, 6, 7, 8, ..., 5040 processes, or use global_batch = 5038"),
        (2, 0, 3, "start one of 1, 2 processes, or use global_batch = 3"),
        (8, 7, 1, "use engine.micro_batch = 8"),
        (7, 2, 1, "use engine.micro_batch = 1"),
    ],
)
def test_a_refusal_names_numbers_that_fit(
    global_batch: int, micro_batch: int, world_size: int, way_out: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_batches(global_batch, micro_batch, world_size)
    assert str(error.value).endswith(f"; {way_out}")


def test_the_json_follows_from_the_plan() -> None:
    config = make_ds_config(EngineConfig(zero_stage=3), plan_batches(64, 4, 2), "bf16", 1.0)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("precision", "tables"),
    [("fp32", set()), ("bf16", {"bf16", "data_types"}), ("fp16", {"fp16", "data_types"})],
)
def test_each_precision_has_its_own_tables(precision: Precision, tables: set[str]) -> None:
    config = make_ds_config(EngineConfig(), plan_batches(8, 0, 1), precision, 0.0)
    assert config.keys() & {"bf16", "fp16", "data_types"} == tables


def test_extra_keys_pass_through_to_the_json() -> None:
    extra = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    config = make_ds_config(EngineConfig(deepspeed_extra=extra), plan_batches(8, 0, 1), "fp32", 0.0)
    assert config["zero_optimization"]["overlap_comm"] and config["wall_clock_breakdown"]


@pytest.mark.parametrize("extra", [{"train_batch_size": 3}, {"zero_optimization": {"stage": 2}}])
def test_extra_keys_that_vitscale_derives_are_refused(extra: dict[str, Any]) -> None:
    config, plan = EngineConfig(deepspeed_extra=extra), plan_batches(8, 0, 1)
    with pytest.raises(ConfigError, match=r"deepspeed_extra\.[\w.]+ is derived by vitscale"):
        make_ds_config(config, plan, "fp32", 0.0)


@pytest.mark.parametrize(
    ("refused", "message", "accepted"),
    [
        ({"zero_stage": 0}, "zero_stage 0 is refused: .* wrong in bf16", {"zero_stage": 1}),
        (
            {"deepspeed_extra": {"zero_optimization": {"round_robin_gradients": True}}},
            "round_robin_gradients is refused",
            {"deepspeed_extra": {"zero_optimization": {"round_robin_gradients": False}}},
        ),
    ],
)
def test_settings_that_lose_state_are_refused_with_the_reason(
    refused: dict[str, Any], message: str, accepted: dict[str, Any]
) -> None:
    EngineConfig(**accepted)
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**refused)


def test_an_extra_table_is_a_new_key_or_is_refused_where_a_number_is_derived() -> None:
    plan = plan_batches(8, 0, 1)
    extra = EngineConfig(deepspeed_extra={"tensorboard": {"enabled": False}})
    assert make_ds_config(extra, plan, "fp32", 0.0)["tensorboard"] == {"enabled": False}
    with pytest.raises(ConfigError, match=r"deepspeed_extra\.train_batch_size is derived by vitscale"):
        make_ds_config(EngineConfig(deepspeed_extra={"train_batch_size": {"x": 1}}), plan, "fp32", 0.0)


@pytest.mark.parametrize(("size", "fits"), [(800, True), (5e8, True), (804, False), (0, False)])
def test_a_gather_bucket_that_is_no_multiple_of_8_is_refused(size: float, fits: bool) -> None:
    extra = {"zero_optimization": {"allgather_bucket_size": size}}
    refusal = pytest.raises(ConfigError, match=rf"allgather_bucket_size = {size} must be a multiple of 8")
    with contextlib.nullcontext() if fits else refusal:
        make_ds_config(EngineConfig(deepspeed_extra=extra), plan_batches(8, 0, 1), "fp32", 0.0)


@pytest.mark.parametrize("key", ["prescale_gradients", "gradient_predivide_factor"])
def test_divisors_of_gradients_are_refused_in_a_job_and_read_in_a_config(key: str) -> None:
    config = EngineConfig(deepspeed_extra={key: 2})
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed_extra\.{key} is refused"):
        make_ds_config(config, plan_batches(8, 0, 1), "fp32", 0.0)


@pytest.mark.parametrize("key", ["micro_batch", "num_workers"])
def test_counts_may_be_zero_and_not_negative(key: str) -> None:
    assert getattr(EngineConfig(**{key: 0}), key) == 0
    with pytest.raises(ConfigError, match="must not be negative"):
        EngineConfig(**{key: -1})


def test_compiled_blocks_are_refused_where_zero_3_would_undo_them_in_silence() -> None:
    """In a new job only: the config of an earlier run, which may change it, is still read."""
    plan = plan_batches(8, 0, 1)
    make_ds_config(EngineConfig(compile=True, zero_stage=2), plan, "fp32", 0.0)
    config = EngineConfig(compile=True, zero_stage=3)
    with pytest.raises(ConfigError, match=r"engine.compile = true is refused with engine.zero_stage = 3"):
        make_ds_config(config, plan, "fp32", 0.0)


@pytest.mark.parametrize(
    ("sizes", "precision", "message"),
    [
        ({"width": 36}, "bf16", "engine.compile = true is refused with model.width = 36: .* multiple of 8"),
        ({"width": 36}, "fp32", None),
        ({"mlp_dim": 100}, "fp16", "refused with model.mlp_dim = 100: .* multiple of 8"),
        ({"mlp_dim": 98}, "fp32", "refused with model.mlp_dim = 98: .* in fp32 .* multiple of 4"),
        ({}, "bf16", None),
    ],
)
def test_sizes_that_compiled_blocks_would_read_from_wrong_addresses_are_refused(
    sizes: dict[str, int], precision: Precision, message: str | None
) -> None:
    model = ViTConfig(variant="mu/16", **sizes)
    check_compiled(EngineConfig(), model, precision)
    if message is None:
        check_compiled(EngineConfig(compile=True), model, precision)
        return
    with pytest.raises(ConfigError, match=message):
        check_compiled(EngineConfig(compile=True), model, precision)


def test_moments_on_a_disk_need_an_optimizer_on_the_cpu() -> None:
    assert EngineConfig(offload_optimizer=True, offload_folder="/nvme").offload_folder == "/nvme"
    with pytest.raises(ConfigError, match=r"engine.offload_folder = ./nvme. needs engine.offload_optimizer"):
        EngineConfig(offload_folder="/nvme")


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_what_deepspeed_would_move_to_a_disk_is_refused(key: str) -> None:
    plan = plan_batches(8, 0, 1)
    for device in ("cpu", "nvme"):
        config = EngineConfig(zero_stage=3, deepspeed_extra={"zero_optimization": {key: {"device": device}}})
        if device == "cpu":
            assert make_ds_config(config, plan, "fp32", 0.0)["zero_optimization"][key] == {"device": "cpu"}
        else:
            with pytest.raises(ConfigError, match=f"{key}.device = .nvme. is refused.*engine.offload_folder"):
                make_ds_config(config, plan, "fp32", 0.0)
