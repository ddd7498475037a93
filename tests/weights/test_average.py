"""The mean of checkpoints: of runs, of exports and of averages over training, in float64."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from foreign_models import TINY, saved_model
from make import write_step
from safetensors.torch import load_file, save_file

from vitscale import load_model
from vitscale.checkpoint.safetensors import SafetensorsReader
from vitscale.config import to_dict
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import ModelConfig, build_model
from vitscale.models.hybrid import HybridConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.average import average, compared_keys
from vitscale.weights.export import export_safetensors
from vitscale.weights.saved import SavedModel


def write_run(
    run: Path, step: int, frozen: str = "cls_token", slots: tuple[str, ...] = ("fp32", "ema")
) -> None:
    """A checkpoint with weights of `step`, an average of -step, and a frozen tensor of 0.5."""
    shapes = {name: param.shape for name, param in build_model(TINY, 0).named_parameters()}
    values = {"fp32": float(step), "ema": -float(step), "exp_avg": 0.0}
    tensors = {
        (slot, name): torch.full(shape, values[slot])
        for slot in slots
        for name, shape in shapes.items()
        if name != frozen
    }
    tensors["fixed", frozen] = torch.full(shapes[frozen], 0.5)
    write_step(run, step, tensors, slots=slots, config={"model": to_dict(TINY)})


def test_the_mean_is_taken_in_float64(tmp_path: Path) -> None:
    for seed in range(3):
        saved_model(tmp_path / f"{seed}.safetensors", seed=seed, step=10 * seed)
    out = average([tmp_path / f"{seed}.safetensors" for seed in (2, 0, 1)], tmp_path / "mean")
    sources = [SavedModel(tmp_path / f"{seed}.safetensors") for seed in (2, 0, 1)]
    averaged = SavedModel(out)
    for name, value in averaged.tensors():
        expected = torch.stack([source.tensor(name).double() for source in sources]).sum(0) / 3
        assert torch.equal(value, expected.float())
    assert averaged.shapes == sources[0].shapes
    assert averaged.step == 20 and load_model(out).config == TINY
    metadata = SafetensorsReader(out).metadata
    assert json.loads(metadata["vitscale.averaged_steps"]) == [20, 0, 10]


def test_runs_and_their_averages_over_training_are_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 12)
    write_run(tmp_path / "b", 14)
    runs = [tmp_path / "a", tmp_path / "b"]
    raw = SavedModel(average(runs, tmp_path / "raw.safetensors")).state_dict()
    ema = SavedModel(average(runs, tmp_path / "ema", slot="ema")).state_dict()
    assert raw.pop("cls_token").unique().item() == ema.pop("cls_token").unique().item() == 0.5
    assert {value.unique().item() for value in raw.values()} == {13.0}
    assert {value.unique().item() for value in ema.values()} == {-13.0}


def test_an_export_takes_the_average_over_training_where_there_is_one(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 12)
    write_run(tmp_path / "plain", 12, slots=("fp32",))
    out = export_safetensors(tmp_path / "a", tmp_path / "ema.safetensors", slot="ema")
    assert SavedModel(out).tensor("head.bias").unique().item() == -12.0
    assert SafetensorsReader(out).metadata["vitscale.state"] == "ema"
    assert load_model(tmp_path / "a", slot="ema").norm.weight.unique().item() == -12.0
    assert load_model(tmp_path / "a", device="meta").norm.weight.device.type == "meta"
    for source in (tmp_path / "plain", out):
        with pytest.raises(CheckpointError, match=r"holds no average of the weights \(EMA\); .*slot=.fp32"):
            average([tmp_path / "a", source], tmp_path / "out", slot="ema")


@pytest.mark.usefixtures("without_type_checks")
def test_only_the_weights_and_their_average_are_loaded_as_a_model(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 12, slots=("fp32", "ema", "exp_avg"))
    export = export_safetensors(tmp_path / "a", tmp_path / "ema.safetensors", slot="ema")
    for path, slot in itertools.product((tmp_path / "a", export), ("exp_avg", "EMA")):
        with pytest.raises(ConfigError, match=f"slot '{slot}' is not one of 'fp32', 'ema'"):
            load_model(path, slot=slot)


def test_different_models_and_single_ones_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "a.safetensors")
    saved_model(tmp_path / "b.safetensors", dataclasses.replace(TINY, gelu="exact"))
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.gelu is 'exact', not 'tanh'; average checkpoints of"):
        average([a, b], tmp_path / "out")
    with pytest.raises(ConfigError, match="average needs two checkpoints or more before OUT, not 1"):
        average([a], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"b\.safetensors exists, and average overwrites nothing"):
        average([a, a], b)
    assert not (tmp_path / "out").exists()
    average([a, a], tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_a_model_with_other_tensors_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saved_model(a)
    tensors, metadata = load_file(a), SafetensorsReader(a).metadata
    save_file({name: value for name, value in tensors.items() if name != "norm.weight"}, b, metadata)
    with pytest.raises(CheckpointError, match=r"b\.safetensors and .*a\.safetensors hold different tensors"):
        average([a, b], tmp_path / "out")


def test_the_same_model_may_be_configured_and_trained_in_two_ways(tmp_path: Path) -> None:
    config = ViTConfig(variant="mu/4", image_size=8, num_classes=3)
    with_numbers = ViTConfig(
        variant="B/4", width=32, depth=1, mlp_dim=128, num_heads=2, image_size=8, num_classes=3, dropout=0.1
    )
    saved_model(tmp_path / "a.safetensors", config)
    saved_model(tmp_path / "b.safetensors", with_numbers)
    out = average([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out")
    assert SavedModel(out).config == config


@pytest.mark.parametrize(
    "config", [ViTConfig(), HybridConfig(), ResNetConfig()], ids=lambda config: config.kind
)
def test_every_key_that_changes_what_weights_compute_is_compared(config: ModelConfig) -> None:
    others = set(to_dict(config)) - set(compared_keys(config))
    assert others - {"variant"} <= {"head_bias", "dropout", "drop_path"}


def test_resnets_are_averaged_unless_their_stages_differ(tmp_path: Path) -> None:
    named = ResNetConfig(variant="R26x1", image_size=32, num_classes=3)
    with_numbers = ResNetConfig(width=64, stages=(2, 2, 2, 2), image_size=32, num_classes=3, head_bias=-1.0)
    other = ResNetConfig(width=64, stages=(2, 2, 2, 1), image_size=32, num_classes=3)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, config in zip(paths, (named, with_numbers, other), strict=True):
        saved_model(path, config)
    assert SavedModel(average(paths[:2], tmp_path / "out")).config == named
    with pytest.raises(CheckpointError, match=r"model.stages is \[2, 2, 2, 1\], not \[2, 2, 2, 2\]"):
        average([paths[0], paths[2]], tmp_path / "none")
    saved_model(tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"model.kind is 'vit', not 'resnet'"):
        average([paths[0], tmp_path / "vit.safetensors"], tmp_path / "none")


def test_a_hybrid_may_be_configured_in_two_ways_unless_its_stem_differs(tmp_path: Path) -> None:
    sizes = {"image_size": 64, "num_classes": 3, "width": 32, "depth": 1, "mlp_dim": 128, "num_heads": 2}
    named = HybridConfig(variant="R26+mu/32", image_size=64, num_classes=3)
    with_numbers = HybridConfig(variant="R50+B/32", stem_stages=(2, 2, 2, 2), dropout=0.1, **sizes)
    root_only = HybridConfig(variant="R+mu/16", image_size=64, num_classes=3)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, config in zip(paths, (named, with_numbers, root_only), strict=True):
        saved_model(path, config)
    assert SavedModel(average(paths[:2], tmp_path / "out")).config == named
    with pytest.raises(CheckpointError, match=r"model.stem_stages is \[\], not \[2, 2, 2, 2\]"):
        average([paths[0], paths[2]], tmp_path / "none")
