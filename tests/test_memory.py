"""Memory per device: the ZeRO paper's own figures, and cases worked out by hand."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.engine.batches import BatchPlan, plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.memory import (
    activation_bytes,
    buffer_bytes,
    checkpoint_bytes,
    count_params,
    estimate,
    explain_too_small,
    head_bytes,
    micro_batches,
    optimizer_bytes,
    state_bytes,
)
from vitscale.models.layers import Checkpointing
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import OptimConfig

GB = 1e9
B16 = ViTConfig(variant="B/16")  # 197 tokens, 12 blocks, D = 768, M = 3072
# One image in one block of B/16, in 16 bit:
#     block  197 * (16 * 768 + 4 * 3072)
#     input  197 * 2 * 768
#     kept   197 * (12 * 768 + 2 * 3072)    with selective recomputation
BLOCK, BLOCK_INPUT, BLOCK_KEPT = 4_841_472, 302_592, 3_025_920
MASKS = 197 * (2 * 768 + 3072)


# The ZeRO paper counts gradients in fp16 alone: 7.5 billion parameters, mixed-precision Adam.
NUM_PARAMS = 7_500_000_000


def with_16_bit_sums(stage: int, world_size: int) -> float:
    """GB of state_bytes, if gradients were not summed in fp32."""
    less = 2 * NUM_PARAMS / (1 if stage == 1 else world_size)
    return (state_bytes(NUM_PARAMS, stage, world_size, "fp16") - less) / GB


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_state_is_what_figure_1_of_the_zero_paper_says(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054, Figure 1: 64 devices."""
    assert round(with_16_bit_sums(stage, 64), 1) == gigabytes


@pytest.mark.parametrize(
    ("world_size", "gigabytes"),
    [(1, (120, 120, 120)), (4, (52.5, 41.3, 30)), (16, (35.6, 21.6, 7.5)), (1024, (30.1, 15.1, 0.12))],
)
def test_state_is_what_table_1_of_the_zero_paper_says(world_size: int, gigabytes: tuple) -> None:
    """arXiv 1910.02054, Table 1, to the digits that are printed."""
    for stage, expected in zip((1, 2, 3), gigabytes, strict=True):
        assert with_16_bit_sums(stage, world_size) == pytest.approx(
            expected, abs=0.051 if expected > 1 else 0.005
        )


@pytest.mark.parametrize(
    ("stage", "world_size", "precision", "expected"),
    [
        # 1,000 parameters; per parameter and device
        (1, 1, "bf16", 18_000),  # 2 + 4 + 12
        (1, 2, "bf16", 12_000),  # 2 + 4 + 12 / 2
        (1, 8, "bf16", 7_500),  # 2 + 4 + 12 / 8
        (2, 1, "bf16", 18_000),
        (2, 2, "bf16", 10_000),  # 2 + (4 + 12) / 2
        (2, 8, "bf16", 4_000),  # 2 + (4 + 12) / 8
        (3, 1, "bf16", 18_000),
        (3, 2, "bf16", 9_000),  # (2 + 4 + 12) / 2
        (3, 8, "bf16", 2_250),  # (2 + 4 + 12) / 8
        (1, 4, "fp16", 9_000),  # as in bf16
        (1, 1, "fp32", 20_000),  # 4 + 4 + 12
        (1, 2, "fp32", 14_000),  # 4 + 4 + 12 / 2
        (1, 8, "fp32", 9_500),  # 4 + 4 + 12 / 8
        (2, 2, "fp32", 12_000),  # 4 + (4 + 12) / 2
        (2, 8, "fp32", 6_000),  # 4 + (4 + 12) / 8
        (3, 2, "fp32", 10_000),  # (4 + 4 + 12) / 2
        (3, 8, "fp32", 2_500),  # (4 + 4 + 12) / 8
    ],
)
def test_state_by_hand(stage: int, world_size: int, precision: str, expected: int) -> None:
    assert state_bytes(1_000, stage, world_size, precision) == expected


@pytest.mark.parametrize(
    ("micro_batch", "precision", "checkpointing", "expected"),
    [
        (1, "bf16", "none", 12 * BLOCK),
        (1, "fp16", "none", 12 * BLOCK),
        (1, "fp32", "none", 2 * 12 * BLOCK),
        (64, "bf16", "none", 64 * 12 * BLOCK),
        (1, "bf16", "full", 12 * BLOCK_INPUT + BLOCK),
        (1, "bf16", "selective", 12 * BLOCK_KEPT + BLOCK),
        (64, "bf16", "full", 64 * (12 * BLOCK_INPUT + BLOCK)),
        (64, "fp32", "full", 2 * 64 * (12 * BLOCK_INPUT + BLOCK)),
    ],
)
def test_activations_of_b16_by_hand(
    micro_batch: int, precision: str, checkpointing: str, expected: int
) -> None:
    assert activation_bytes(B16, micro_batch, precision, checkpointing) == expected


@pytest.mark.parametrize(
    ("precision", "checkpointing", "expected"),
    [
        ("bf16", "none", 12 * (BLOCK + MASKS)),
        ("fp32", "none", 12 * (2 * BLOCK + MASKS)),
        ("bf16", "selective", 12 * BLOCK_KEPT + BLOCK + MASKS),
        ("fp32", "full", 12 * 2 * BLOCK_INPUT + 2 * BLOCK + MASKS),
    ],
)
def test_dropout_keeps_masks_by_hand(precision: str, checkpointing: str, expected: int) -> None:
    """A byte for each output of attention and MLP, and of the layer between: 2 * 768 + 3072."""
    dropping = dataclasses.replace(B16, dropout=0.1)
    assert activation_bytes(dropping, 1, precision, checkpointing) == expected


def test_activations_grow_with_every_size_of_the_model() -> None:
    """64 tokens of a 32-pixel image, 3 blocks, D = 48, M = 40; 16 D + 4 M for each."""
    small = ViTConfig(width=48, depth=3, mlp_dim=40, num_heads=3, patch_size=4, image_size=32, pool="mean")
    assert activation_bytes(small, 1, "bf16", "none") == 3 * 64 * (16 * 48 + 4 * 40)
    deeper, larger = (dataclasses.replace(small, **change) for change in ({"depth": 6}, {"image_size": 64}))
    assert activation_bytes(deeper, 1, "bf16", "none") == 2 * activation_bytes(small, 1, "bf16", "none")
    assert activation_bytes(larger, 1, "bf16", "none") == 4 * activation_bytes(small, 1, "bf16", "none")


def explain(
    plan: BatchPlan,
    gib: float,
    model: ViTConfig = B16,
    *,
    pairs: bool = False,
    starting: bool = False,
    **engine: object,
) -> str:
    config = EngineConfig(micro_batch=plan.micro_batch, **engine)  # type: ignore[arg-type]
    return explain_too_small(model, config, plan, "bf16", int(gib * 2**30), pairs=pairs, starting=starting)


def test_where_memory_runs_out_the_largest_micro_batch_that_fits_is_named() -> None:
    """B/16 in bf16 on one device: 1.45 GiB of state and 0.0541 GiB an image."""
    plan = plan_batches(1536, 1536, 1)
    assert explain(plan, 80) == (
        "CUDA is out of memory with engine.micro_batch 1536: by plan it needs activations 83.11 GiB (the "
        "largest part) and parameters and state 1.45 GiB of 80.00 GiB; set engine.micro_batch = 768, the "
        "largest below it that fits by plan"
    )
    # 512 images take 27.7 GiB, 384 take 20.8: each divides the 1,536 of the rank.
    for gib, micro_batch in ((30, 512), (29, 384), (1.64, 3)):
        assert f"set engine.micro_batch = {micro_batch}, " in explain(plan, gib)
    assert "set engine.micro_batch = 2, " in explain(plan, 1.64, pairs=True)


def test_a_micro_batch_that_ran_out_is_not_advised_though_it_fits_by_plan() -> None:
    assert "set engine.micro_batch = 32, " in explain(plan_batches(64, 64, 1), 80)


H14, G14 = ViTConfig(variant="H/14"), ViTConfig(variant="G/14")
STAGE_3, OFFLOAD = "engine.zero_stage = 3 or ", "engine.offload_optimizer = true or "


@pytest.mark.parametrize(
    ("model", "world_size", "engine", "advice"),
    [
        (B16, 1, {}, 'engine.activation_checkpointing = "full" or '),
        (B16, 2, {"activation_checkpointing": "full"}, ""),
        (H14, 1, {"activation_checkpointing": "full"}, OFFLOAD),
        (H14, 64, {"activation_checkpointing": "full"}, ""),
        (G14, 2, {"activation_checkpointing": "full"}, STAGE_3 + OFFLOAD),
        (G14, 8, {"activation_checkpointing": "full", "zero_stage": 2}, STAGE_3 + OFFLOAD),
        (G14, 2, {"zero_stage": 3, "activation_checkpointing": "full", "offload_optimizer": True}, ""),
    ],
)
def test_where_no_micro_batch_fits_what_is_advised_needs_less(
    model: ViTConfig, world_size: int, engine: dict, advice: str
) -> None:
    """ZeRO 3 and offload take 1 to 5 GB of buffers, more than they save of a small state."""
    sentence = explain(plan_batches(64, 0, world_size), 0.1, model, **engine)
    assert sentence.endswith(f"; no smaller one fits by plan: use {advice}more devices")


def test_micro_batch_one_has_none_below_it() -> None:
    assert "no smaller one fits by plan" in explain(plan_batches(64, 1, 1), 80)


def test_at_the_start_there_are_no_activations_to_save() -> None:
    plan = plan_batches(64, 8, 8)
    assert explain(plan, 1, G14, starting=True, zero_stage=2) == (
        "CUDA is out of memory at the start, while the model is made: by plan parameters and state take 6.87 "
        "GiB of 1.00 GiB; use engine.zero_stage = 3 or engine.offload_optimizer = true or more devices"
    )


def test_an_offloaded_optimizer_leaves_its_memory_to_activations() -> None:
    """Of B/16 in bf16 on one device, 1.0 of 1.5 GiB of state are the optimizer's."""
    plan = plan_batches(64, 64, 1)
    assert state_bytes(1_000, 1, 1, "fp32", offload=True) == 8_000
    assert "no smaller one fits by plan" in explain(plan, 0.95)
    assert "set engine.micro_batch = 8, " in explain(plan, 0.95, offload_optimizer=True)


RESULTS = Path(__file__).resolve().parents[1] / "tools" / "results"
POLICIES: dict[str, Checkpointing] = {
    "vitscale": "none",
    "vitscale, compiled": "none",
    "vitscale, selective recomputation": "selective",
    "vitscale, selective recomputation, compiled": "selective",
    "vitscale, full recomputation": "full",
    "vitscale, full recomputation, compiled": "full",
}


def measured_peaks() -> Iterator[tuple[str, int, Checkpointing, float]]:
    """(variant, images, policy, GiB) of every row of our own that tools/results/ has."""
    for path in sorted(RESULTS.glob("*.json")):
        file = json.loads(path.read_text())
        pieces = [file] if "images of a step" in file else file.values()
        for piece in pieces:
            if isinstance(piece, dict):
                for name in POLICIES.keys() & piece.keys():
                    variant = piece["model"].partition(" ")[0]
                    yield variant, piece["images of a step"], POLICIES[name], piece[name]["peak memory, GiB"]


def estimated_then(variant: str, images: int, policy: Checkpointing = "none") -> float:
    """GiB of the estimate as they were measured: gradients in bf16 stayed beside their sums.

    DeepSpeed has since been told to free each at once, which has not been measured.
    """
    model, engine = ViTConfig(variant=variant), EngineConfig(activation_checkpointing=policy)
    return (estimate(model, engine, images, 1, "bf16").allocated + 2 * count_params(model)) / 2**30


# This row is wrong. It says 16.7 GiB, and the plain loop after it needed 31.3. What it lacks is
# the size of H/14's state (11.8 GiB): the same process had measured H/14 before, whose engine
# was probably subtracted as what was there before, and freed later. The bench frees it now.
SPOILED = ("S/16", 1024)


def test_the_estimate_is_within_6_percent_of_every_peak_that_a_gpu_measured() -> None:
    """Of one H200, in bf16 at ZeRO 1; the errors are from -6% to +5%."""
    errors = []
    for variant, images, policy, gib in measured_peaks():
        if (variant, images) != SPOILED:
            errors.append(estimated_then(variant, images, policy) / gib - 1)
    assert len(errors) == 8 and max(map(abs, errors)) < 0.06, errors


def test_the_row_that_is_left_out_lacks_the_state_of_the_model_before_it() -> None:
    (measured,) = [gib for variant, images, _, gib in measured_peaks() if (variant, images) == SPOILED]
    before = (state_bytes(632_045_800, 1, 1, "bf16") + 2 * 632_045_800) / 2**30
    assert measured + before == pytest.approx(estimated_then("S/16", 1024), rel=0.02)


@pytest.mark.parametrize(
    ("variant", "images"), [("B/16", 512), ("L/16", 256), ("H/14", 128), ("g/14", 64), ("G/14", 32)]
)
def test_what_nemo_trains_on_80_gb_fits(variant: str, images: int) -> None:
    """The micro batches of NeMo 24.12's configs of ViT for A100s of 80 GB, on one node of 8."""
    model = ViTConfig(variant=variant)
    assert 30e9 < estimate(model, EngineConfig(), images, 8, "bf16").total < 80e9
    assert estimate(model, EngineConfig(), 3 * images, 8, "bf16").total > 80e9


def test_an_estimate_is_the_sum_of_its_parts() -> None:
    """B/16 has 86,567,656 parameters; 32 images, 1,000 classes, 8 devices."""
    assert count_params(B16) == 86_567_656
    memory = estimate(B16, EngineConfig(), 32, 8, "bf16")
    assert memory.state == 86_567_656 * 6 + 86_567_656 * 12 // 8
    assert memory.activations == 32 * 12 * BLOCK + 1_000 * (16 * 32 + 8 * 768)
    assert memory.buffers == 0
    assert memory.allocated == memory.state + memory.activations
    assert memory.overhead == pytest.approx(2e9 + 0.05 * memory.allocated, abs=1)
    assert memory.total == memory.allocated + memory.overhead


def test_an_average_and_a_policy_count_and_an_offloaded_optimizer_does_not() -> None:
    plain = estimate(B16, EngineConfig(), 32, 8, "bf16")
    assert (
        estimate(B16, EngineConfig(), 32, 8, "bf16", average=True).state - plain.state == 4 * 86_567_656 // 8
    )
    offloaded = estimate(B16, EngineConfig(offload_optimizer=True), 32, 8, "bf16")
    assert plain.state - offloaded.state == 12 * 86_567_656 // 8
    full = estimate(B16, EngineConfig(activation_checkpointing="full"), 32, 8, "bf16")
    assert plain.activations - full.activations == 32 * (11 * BLOCK - 12 * BLOCK_INPUT)


@pytest.mark.parametrize(
    ("num_params", "stage", "precision", "reduced_in", "offload", "expected"),
    [
        (6e8, 1, "bf16", "fp32", False, 0),
        (6e8, 1, "bf16", "fp32", True, 2e9),  # a bucket of 5e8 sums of 4 bytes
        (6e8, 1, "fp16", "fp32", False, 2e9),
        (6e8, 1, "fp16", "fp16", False, 3e9),  # and a copy to be sent
        (6e8, 2, "bf16", "bf16", False, 1e9),
        (6e8, 2, "bf16", "fp32", False, 3e9),
        (5e8, 2, "bf16", "fp32", False, 1e9),  # copied after the backward pass
        (6e8, 2, "fp32", "fp32", False, 2e9),
        (4e8, 3, "bf16", "bf16", False, 1.8e9),  # and 0.4e9 parameters
        (4e9, 3, "bf16", "bf16", False, 3e9),  # and 0.5e9 of them, and a copy
        (4e9, 3, "bf16", "fp32", False, 5e9),
    ],
)
def test_buffers_by_hand(
    num_params: float, stage: int, precision: str, reduced_in: str, offload: bool, expected: float
) -> None:
    assert buffer_bytes(int(num_params), stage, precision, reduced_in, offload=offload) == expected


def test_a_head_by_hand() -> None:
    """16 bytes a class and image, and 8 a class and input: 768, or those of the tanh layer."""
    many = ViTConfig(variant="B/16", num_classes=21_843)
    assert head_bytes(many, 64) == 21_843 * (16 * 64 + 8 * 768)
    assert head_bytes(dataclasses.replace(many, representation_size=100), 1) == 21_843 * (16 + 8 * 100)


def test_a_head_on_patches_by_hand() -> None:
    masked = ViTConfig(variant="B/16", num_classes=0, num_patch_outputs=512)
    assert head_bytes(masked, 64) == 512 * (16 * 64 * 196 + 8 * 768)


def test_micro_batches_divide_a_rank_and_are_even_for_pairs() -> None:
    assert micro_batches(12, pairs=False) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(12, pairs=True) == [2, 4, 6, 12]
    assert micro_batches(9, pairs=True) == []


def test_other_optimizers_need_less_than_adamw() -> None:
    """B/16 on 8 devices: the kernels of its blocks are 12 x 12 x 768^2 values."""
    matrices = 12 * 12 * 768**2
    adamw = estimate(B16, EngineConfig(), 32, 8, "bf16").state
    saved = {
        name: adamw - estimate(B16, EngineConfig(), 32, 8, "bf16", optimizer=name).state
        for name in ("sgd", "muon", "adafactor")
    }
    assert saved["sgd"] == 4 * 86_567_656 // 8
    assert saved["muon"] == pytest.approx(4 * matrices / 8, abs=1)
    # Of what has rows and columns: of each block 4 matrices of the attention and 2 of the MLP,
    # of the embeddings, the positions and the head one each. Of what has not, every value.
    rows_and_columns = 12 * (4 * 1536 + 2 * 3840) + 1536 + 965 + 1768
    values = 12 * (4 * 768 + 3 * 768 + 768 + 3072 + 768) + 768 + 2 * 768 + 768 + 1000
    assert saved["adafactor"] == 6 * 86_567_656 // 8 - 4 * (rows_and_columns + values)
    assert 4 * (rows_and_columns + values) < 0.02 * adamw


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_a_checkpoint_has_the_bytes_that_are_planned(name: str) -> None:
    slots = {"adamw": 12, "sgd": 8, "adafactor": 6, "muon": 12}
    planned = checkpoint_bytes(B16, OptimConfig(name=name))  # type: ignore[arg-type]
    saved = 4 * 12 * 12 * 768**2 if name == "muon" else 0
    whole = optimizer_bytes(B16, name).whole
    assert planned == slots[name] * 86_567_656 - saved + whole
    frozen = OptimConfig(name=name, freeze=("blocks.*",))  # type: ignore[arg-type]
    assert 4 * 86_567_656 < checkpoint_bytes(B16, frozen) < planned / 1.2


def test_what_muon_refuses_is_not_advised() -> None:
    plan = plan_batches(64, 32, 2)
    message = explain_too_small(B16, EngineConfig(), plan, "bf16", 2**30, "muon", pairs=False, starting=True)
    assert message.endswith("; use more devices")
