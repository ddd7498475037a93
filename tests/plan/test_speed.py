"""Efficiencies: guesses, measurements of real GPUs, and how well some predict the others."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitscale import config as configs
from vitscale.errors import ConfigError
from vitscale.memory import activation_bytes
from vitscale.models import ModelConfig
from vitscale.models.flops import train_flops
from vitscale.models.hybrid import HybridConfig
from vitscale.models.layers import Checkpointing
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.plan.make import Cluster, make_plan
from vitscale.plan.speed import EAGER, Speed, read_measurements
from vitscale.plan.text import render, results
from vitscale.system.hardware import GPUS, Gpu
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SUITE, SINGLE = ROOT / "tools/results/h200.json", ROOT / "tools/results/h200_b16.json"
H100, H200, A100 = GPUS["H100"], GPUS["H200"], GPUS["A100"]


def images_per_second(
    speed: Speed,
    variant: str,
    batch: int,
    policy: Checkpointing = "none",
    *,
    compiled: bool = True,
    **sizes: int,
) -> float:
    """By plan, on one H200, at ZeRO 1."""
    config = configs.from_dict(
        TrainConfig,
        {
            "run_dir": "run",
            "global_batch": batch,
            "total_steps": 100,
            "precision": "bf16",
            "model": {"variant": variant, **sizes},
            "data": {"index": "index.json"},
            "engine": {"compile": compiled},
        },
    )
    made = make_plan(config, Cluster(gpus=1, gpu="h200"), speed)
    (option,) = [o for o in made.options if (o.zero_stage, o.checkpointing) == (1, policy)]
    assert option.accumulation == 1
    return option.images_per_second


def without(path: Path, tmp_path: Path, *names: str) -> Speed:
    file = json.loads(path.read_text())
    (tmp_path / "some.json").write_text(json.dumps({k: v for k, v in file.items() if k not in names}))
    return read_measurements(tmp_path / "some.json")


def as_if_of(model: ModelConfig, tmp_path: Path) -> Speed:
    """The file of B/16 with another model's sizes."""
    piece = {**json.loads(SINGLE.read_text()), "config": configs.to_dict(model)}
    (tmp_path / "other.json").write_text(json.dumps(piece))
    return read_measurements(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("variant", "gpu", "expected"),
    [
        ("Ti/16", H100, 0.1418),
        ("S/16", H200, 0.2840),
        ("B/16", H100, 0.3357),
        ("B/16", H200, 0.4020),
        ("L/16", H100, 0.3862),
        ("H/14", H100, 0.4270),
        ("H/14", A100, 0.5334),
        ("G/14", H100, 0.4770),
    ],
)
def test_guesses_go_by_matmuls_and_memory(variant: str, gpu: Gpu, expected: float) -> None:
    model = ViTConfig(variant=variant)
    assert Speed().efficiency(model, gpu, compiled=True) == pytest.approx(expected, abs=1e-4)
    assert Speed().efficiency(model, gpu, compiled=False) == pytest.approx(EAGER * expected, abs=1e-4)


def test_a_guess_by_hand() -> None:
    """B/16 on an H100: 105.378 GFLOP at 0.74 * 989 TFLOP/s take 143.99 us, and 10 times the
    197 * 12 * (16 * 768 + 4 * 3,072) = 58,097,664 bytes at 3.35 TB/s 173.43 us."""
    expected = 105.378361344 / 989e3 / (143.99e-6 + 173.43e-6)
    efficiency = Speed().efficiency(ViTConfig(variant="B/16"), H100, compiled=True)
    assert efficiency == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("variant", "batch", "measured", "error"),
    [
        ("S/16", 1_024, 10_544.0, -0.04),
        ("B/16", 512, 3_859.8, -0.03),
        ("B/16", 256, 3_646.3, 0.02),
        ("L/16", 256, 1_259.0, -0.05),
        ("H/14", 256, 452.0, 0.06),
    ],
)
def test_guesses_are_within_6_percent_of_what_was_measured(
    variant: str, batch: int, measured: float, error: float
) -> None:
    """Images/s on one H200. The constants were chosen by these figures."""
    assert images_per_second(Speed(), variant, batch) / measured - 1 == pytest.approx(error, abs=0.006)


def test_resnets_have_guesses_of_their_own_which_measured_vits_leave_alone() -> None:
    for variant, expected in (("R50x1", 0.079), ("R50x2", 0.141), ("R101x3", 0.228), ("R152x4", 0.282)):
        efficiency = Speed().efficiency(ResNetConfig(variant=variant), H100, compiled=True)
        assert efficiency == pytest.approx(expected, abs=1e-3)
    config = configs.load(
        TrainConfig, [ROOT / "configs/pretrain/bit_r50x1_jft.toml"], ["engine.compile=true"]
    )
    guessed, calibrated = (
        make_plan(config, Cluster(gpus=8, gpu="h200"), speed) for speed in (Speed(), read_measurements(SUITE))
    )
    assert calibrated.options == guessed.options and guessed.best is not None
    assert "R50x1 at 224 px on 8 x H200" in render(calibrated)
    shown = [" ".join(render(made).split()) for made in (guessed, calibrated)]
    assert all("a guess: 10.8% of the peak" in text for text in shown)
    assert "measure it, and pass --calibrate" in shown[0]
    assert "; the file of --calibrate has no resnet: measure one" in shown[1]
    assert results(calibrated)["calibrated_on"] == ""


def test_a_hybrid_takes_the_time_of_its_parts() -> None:
    """Its stem moves as much memory as a ResNet for what it keeps, and its blocks as a ViT."""
    hybrid, vit = HybridConfig(variant="R50+B/32"), ViTConfig(variant="B/16")
    assert hybrid.num_tokens == 50 and hybrid.resolved_depth == vit.resolved_depth
    of_blocks = 58_097_664 * 50 // 197  # of B/16, above
    of_stem = (
        activation_bytes(hybrid, 2, "bf16", "none") - activation_bytes(hybrid, 1, "bf16", "none") - of_blocks
    )
    assert of_stem > of_blocks
    flops = train_flops(hybrid)
    seconds = flops / (0.74 * 989e12) + (10 * of_blocks + 24 * of_stem) / 3.35e12
    efficiency = Speed().efficiency(hybrid, H100, compiled=True)
    assert efficiency == pytest.approx(flops / 989e12 / seconds, rel=1e-5)


def test_measured_hybrids_are_read(tmp_path: Path) -> None:
    speed = as_if_of(model := HybridConfig(variant="R50+B/16"), tmp_path)
    assert {row.model for row in speed.rows} == {model}
    assert speed.of_kind("vit").rows == () and speed.of_kind("hybrid") == speed


def test_a_model_of_images_that_are_no_squares_is_read(tmp_path: Path) -> None:
    speed = as_if_of(model := ViTConfig(variant="B/16", image_size=(384, 128)), tmp_path)
    assert {row.model for row in speed.rows} == {model}


def test_measured_resnets_are_read(tmp_path: Path) -> None:
    speed = as_if_of(model := ResNetConfig(variant="R50x1"), tmp_path)
    assert {row.model for row in speed.rows} == {model}
    assert speed.of_kind("vit").rows == () and speed.of_kind("resnet") == speed


def test_recomputation_is_guessed_by_its_flops() -> None:
    works = [Speed().work(policy, compiled=True) for policy in ("none", "selective", "full")]
    assert works == pytest.approx([1, 3.05 / 3, 4 / 3])
    assert [Speed().is_measured(policy, compiled=True) for policy in ("none", "full")] == [True, False]


@pytest.mark.parametrize(
    ("policy", "compiled", "measured"),
    [
        ("none", True, 3_646.3),
        ("selective", True, 3_539.4),
        ("full", True, 3_093.2),
        ("none", False, 3_085.0),
        ("selective", False, 2_811.9),
        ("full", False, 2_537.5),
    ],
)
def test_a_plan_repeats_what_it_is_calibrated_by(
    policy: Checkpointing, compiled: bool, measured: float
) -> None:
    """B/16, 256 images. The update is planned beside the passes, and not counted twice."""
    speed = read_measurements(SINGLE)
    planned = images_per_second(speed, "B/16", 256, policy, compiled=compiled)
    assert planned == pytest.approx(measured, rel=1e-4)
    assert speed.is_measured(policy, compiled=compiled) and speed.device == "NVIDIA H200"


def test_another_micro_batch_is_predicted_within_6_percent() -> None:
    """B/16: 256 images measured; 512 gave 3,860 images/s, which is 5.5% more than planned."""
    planned = images_per_second(read_measurements(SINGLE), "B/16", 512)
    assert planned / 3_859.8 - 1 == pytest.approx(-0.053, abs=0.003)


def test_a_model_between_two_that_were_measured_is_predicted_within_15_percent(tmp_path: Path) -> None:
    """B/16 from S/16 and H/14: 5% less than the 3,860 images/s that were measured."""
    planned = images_per_second(without(SUITE, tmp_path, "B/16"), "B/16", 512)
    assert planned / 3_859.8 - 1 == pytest.approx(-0.054, abs=0.003)


@pytest.mark.parametrize(
    ("variant", "batch", "measured", "error"), [("H/14", 128, 438.6, 0.11), ("S/16", 1024, 10_544.0, -0.01)]
)
def test_a_model_beyond_those_that_were_measured_is_predicted_within_15_percent(
    variant: str, batch: int, measured: float, error: float, tmp_path: Path
) -> None:
    """From the nearest of the others, by the guesses of both."""
    planned = images_per_second(without(SUITE, tmp_path, variant), variant, batch)
    assert planned / measured - 1 == pytest.approx(error, abs=0.006)


def test_a_mode_that_was_not_measured_goes_by_the_other() -> None:
    """The suite has compiled rows only: an eager step is slower by the guess."""
    speed, model = read_measurements(SUITE), ViTConfig(variant="B/16")
    compiled = speed.efficiency(model, H200, compiled=True)
    assert speed.efficiency(model, H200, compiled=False) == pytest.approx(EAGER * compiled)
    assert not speed.is_measured("full", compiled=True)
    assert speed.work("full", compiled=True) == pytest.approx(4 / 3)


def write(tmp_path: Path, **changes: Any) -> Path:
    piece = {
        "config": configs.to_dict(ViTConfig(variant="B/16")),
        "device": "NVIDIA H100 80GB HBM3",
        "precision": "bf16",
        "images of a step": 100,
        "vitscale": {"images/s": 1_000.0},
        "vitscale, full recomputation": {"failed": "out of memory"},
        "plain": {"images/s": 1.0},
    } | changes
    path = tmp_path / "results.json"
    given = {name: value for name, value in piece.items() if value is not None}
    path.write_text(json.dumps({"bench": "step", "results": given}))
    return path


def test_a_single_result_of_any_policy_is_read(tmp_path: Path) -> None:
    """100 images in 0.1 s, of which the update takes 30 * 86,567,656 / (0.8 * 3.35e12)."""
    speed = read_measurements(write(tmp_path))
    (row,) = speed.rows
    assert (row.model, row.compiled, row.gpu) == (ViTConfig(variant="B/16"), False, H100)
    assert row.seconds_per_image == pytest.approx((0.1 - 0.969e-3) / 100, rel=1e-5)
    assert speed.decode_rate == 0 and not speed.is_measured("full", compiled=False)


def test_a_plan_repeats_a_model_of_other_sizes_than_its_variant_has(tmp_path: Path) -> None:
    """B/16 of half the depth, at 7,200 images/s."""
    model = ViTConfig(variant="B/16", depth=6)
    changes = {
        "device": "NVIDIA H200",
        "images of a step": 512,
        "vitscale, compiled": {"images/s": 7_200.0},
    }
    speed = read_measurements(write(tmp_path, config=configs.to_dict(model), **changes))
    assert images_per_second(speed, "B/16", 512, depth=6) == pytest.approx(7_200, rel=1e-4)


def test_the_decode_rate_of_an_end_to_end_run_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    file = json.loads(SUITE.read_text()) | {"end to end": {"images/s per data worker": 612.0}}
    path.write_text(json.dumps(file))
    speed = read_measurements(path)
    config = configs.load(TrainConfig, [ROOT / "configs/pretrain/vit_h14_jft.toml"])
    made = make_plan(config, Cluster(gpus=8, gpu="h200"), speed)
    assert made.decode_rate == 612.0
    shown = " ".join(render(made).split())
    assert "measured by an end-to-end run: at least 612 images/s a core" in shown
    assert "45.3% of the peak at ZeRO 1 without recomputation, measured on NVIDIA H200; the cost of" in shown
    given = make_plan(config, Cluster(gpus=8, decode_rate=700.0), speed)
    assert given.decode_rate == 700.0
    shown = " ".join(render(given).split())
    assert "as given by --decode-rate" in shown and "on NVIDIA H200, another kind of GPU" in shown


def test_a_model_that_was_not_measured_is_said_to_be_guessed() -> None:
    config = configs.load(TrainConfig, [ROOT / "configs/pretrain/vit_h14_jft.toml"], ["model.variant=L/16"])
    shown = " ".join(render(make_plan(config, Cluster(gpus=8), read_measurements(SUITE))).split())
    assert "a guess that is corrected by S/16, B/16, H/14, measured on NVIDIA H200" in shown


@pytest.mark.parametrize(
    ("overrides", "measured"),
    [
        ([], True),
        (["model.image_size=378"], False),
        (["model.depth=16"], False),
        (["engine.compile=false"], False),
    ],
)
def test_only_the_same_model_in_the_same_mode_is_said_to_be_measured(
    overrides: list[str], measured: bool
) -> None:
    """The width is the same in all of them."""
    config = configs.load(TrainConfig, [ROOT / "configs/pretrain/vit_h14_jft.toml"], overrides)
    shown = " ".join(render(make_plan(config, Cluster(gpus=8), read_measurements(SUITE))).split())
    assert ("without recomputation, measured on NVIDIA H200" in shown) is measured
    assert ("a guess that is corrected by S/16, B/16, H/14, measured on" in shown) is not measured


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "CPU"}, "was measured on CPU, whose peak is not known"),
        ({"precision": "fp32"}, "has no row of vitscale in bf16 without recomputation"),
        ({"vitscale": {"failed": "out of memory"}}, "has no row of vitscale in bf16 without recomputation"),
        ({"config": None}, "does not hold results of a step"),
        ({"config": {"variant": "B/17"}}, ": "),
        ({"config": 3}, "does not hold results of a step"),
        ({"vitscale": {"images/s": "many"}}, "does not hold results of a step"),
        ({"vitscale": {"images/s": 0}}, "does not hold results of a step"),
    ],
)
def test_other_files_are_one_sentence(tmp_path: Path, changes: dict, sentence: str) -> None:
    """The control, without changes, is the test of a single result above."""
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as raised:
        read_measurements(path)
    assert str(raised.value).startswith(f"--calibrate {path}{'' if sentence[0] == ':' else ' '}{sentence}")


@pytest.mark.parametrize("text", ["[1]", "{}", "3", "no JSON", "[" * 99_999, '{"results": 3}'], ids=len)
def test_what_is_no_table_of_results_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--calibrate"):
        read_measurements(path)
