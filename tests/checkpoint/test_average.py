"""The mean of checkpoints: of runs, exports and averages over training, in float64."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_step
from foreign_models import TINY, saved_model

from vitscale import load_model
from vitscale.checkpoint.average import average
from vitscale.checkpoint.export import SavedModel, export_safetensors
from vitscale.checkpoint.format import CheckpointError, SafetensorsReader
from vitscale.config import to_dict
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig


def write_run(
    run: Path, step: int, frozen: str = "cls_token", states: tuple[str, ...] = ("fp32", "ema")
) -> None:
    """A checkpoint whose fp32 weights are all `step` and whose average is -step; the frozen tensor is 0.5."""
    shapes = {name: param.shape for name, param in build_model(TINY, 0).named_parameters()}
    values = {"fp32": float(step), "ema": -float(step)}
    tensors = {
        (state, name): torch.full(shape, values[state])
        for state in states
        for name, shape in shapes.items()
        if name != frozen
    }
    tensors["fixed", frozen] = torch.full(shapes[frozen], 0.5)
    write_step(run, step, tensors, states=states, config={"model": to_dict(TINY)})


def test_the_mean_is_taken_in_float64(tmp_path: Path) -> None:
    for seed in range(3):
        saved_model(tmp_path / f"{seed}.safetensors", seed=seed, step=10 * seed)
    out = average([tmp_path / f"{seed}.safetensors" for seed in (2, 0, 1)], tmp_path / "mean")
    sources = [SavedModel(tmp_path / f"{seed}.safetensors").state() for seed in (2, 0, 1)]
    for name, value in SavedModel(out).state().items():
        expected = torch.stack([source[name].double() for source in sources]).sum(0) / 3
        assert torch.equal(value, expected.float())
    assert SavedModel(out).step == 20 and load_model(out).config == TINY
    metadata = SafetensorsReader(out).metadata
    assert json.loads(metadata["vitscale.averaged_steps"]) == [20, 0, 10]


def test_runs_and_their_averages_over_training_are_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 12)
    write_run(tmp_path / "b", 14)
    raw = SavedModel(average([tmp_path / "a", tmp_path / "b"], tmp_path / "raw.safetensors")).state()
    ema = SavedModel(average([tmp_path / "a", tmp_path / "b"], tmp_path / "ema", state="ema")).state()
    assert {value.unique().item() for name, value in raw.items() if name != "cls_token"} == {13.0}
    assert {value.unique().item() for name, value in ema.items() if name != "cls_token"} == {-13.0}
    assert raw["cls_token"].unique().item() == ema["cls_token"].unique().item() == 0.5


def test_an_export_takes_the_average_over_training_where_there_is_one(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 12)
    write_run(tmp_path / "plain", 12, states=("fp32",))
    out = export_safetensors(tmp_path / "a", tmp_path / "ema.safetensors", state="ema")
    assert SavedModel(out).tensor("head.bias").unique().item() == -12.0
    assert SafetensorsReader(out).metadata["vitscale.state"] == "ema"
    assert load_model(tmp_path / "a", state="ema").norm.weight.unique().item() == -12.0
    for source in (tmp_path / "plain", out):
        with pytest.raises(CheckpointError, match=r"has no average of the weights \(EMA\).*leave --ema out"):
            average([tmp_path / "a", source], tmp_path / "out", state="ema")


def test_different_models_and_single_ones_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "a.safetensors")
    saved_model(tmp_path / "b.safetensors", dataclasses.replace(TINY, gelu="exact"))
    with pytest.raises(
        CheckpointError, match=r"model.gelu is 'exact', not 'tanh'; average checkpoints of one"
    ):
        average([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="average needs two checkpoints or more before OUT, not 1"):
        average([tmp_path / "a.safetensors"], tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"b.safetensors exists, and average overwrites nothing: is OUT"
    ):
        average([tmp_path / "a.safetensors"] * 2, tmp_path / "b.safetensors")
    assert not (tmp_path / "out").exists()


def test_the_same_model_may_be_spelled_and_trained_in_two_ways(tmp_path: Path) -> None:
    config = ModelConfig(variant="mu/4", image_size=8, num_classes=3)
    spelled = ModelConfig(
        variant="B/4", width=32, depth=1, mlp_dim=128, num_heads=2, image_size=8, num_classes=3, dropout=0.1
    )
    saved_model(tmp_path / "a.safetensors", config)
    saved_model(tmp_path / "b.safetensors", spelled)
    out = average([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out")
    assert SavedModel(out).config == config
