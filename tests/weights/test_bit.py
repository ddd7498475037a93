"""BiT's .npz files both ways: timm computes the same logits from them."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import Arrays, arrays_of, imported, logits, same_weights, saved_model

from vitscale import load_model
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.resnet import ResNetConfig
from vitscale.weights.foreign.convert import export_model, import_model

TINY = ResNetConfig(width=32, stages=(1, 2), image_size=40, num_classes=5)
UNIT = "resnet/block1/unit01"
# Of TINY, but for block2.
SHAPES = {
    "resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 32),
    f"{UNIT}/a/group_norm/gamma": (32,),
    f"{UNIT}/a/group_norm/beta": (32,),
    f"{UNIT}/a/proj/standardized_conv2d/kernel": (1, 1, 32, 128),
    f"{UNIT}/a/standardized_conv2d/kernel": (1, 1, 32, 32),
    f"{UNIT}/b/group_norm/gamma": (32,),
    f"{UNIT}/b/group_norm/beta": (32,),
    f"{UNIT}/b/standardized_conv2d/kernel": (3, 3, 32, 32),
    f"{UNIT}/c/group_norm/gamma": (32,),
    f"{UNIT}/c/group_norm/beta": (32,),
    f"{UNIT}/c/standardized_conv2d/kernel": (1, 1, 32, 128),
    "resnet/group_norm/gamma": (256,),
    "resnet/group_norm/beta": (256,),
    "resnet/head/conv2d/kernel": (1, 1, 256, 5),
    "resnet/head/conv2d/bias": (5,),
}


def exported(folder: Path, config: ResNetConfig = TINY) -> tuple[Any, Path]:
    """A random model, and its .npz file."""
    model = saved_model(folder / "ours.safetensors", config)
    return model, export_model(folder / "ours.safetensors", folder / "ours.npz")


def timm_bit(timm: Any, config: ResNetConfig) -> Any:
    """timm's BiT of these sizes."""
    channels = [4 * config.resolved_width * 2**stage for stage in range(len(config.resolved_stages))]
    return timm.models.resnetv2.ResNetV2(
        layers=config.resolved_stages,
        channels=channels,
        num_classes=config.num_classes,
        stem_chs=config.resolved_width,
        stem_type="fixed",
        conv_layer=partial(timm.layers.StdConv2d, eps=1e-8),
    )


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, stages=(2, 1, 1), image_size=64)], ids=["odd", "even"]
)
def test_timm_computes_the_logits_of_an_export(tmp_path: Path, timm: Any, config: ResNetConfig) -> None:
    model, path = exported(tmp_path, config)
    other = timm_bit(timm, config)
    other.load_pretrained(path)
    expected = logits(model, config)
    assert (logits(other.eval(), config) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_timms_r50x1_computes_our_logits(tmp_path: Path, timm: Any) -> None:
    config = ResNetConfig(variant="R50x1", image_size=128, num_classes=1000)
    model, path = exported(tmp_path, config)
    other = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
    other.load_pretrained(path)
    expected = logits(model, config)
    assert (logits(other.eval(), config) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_names_and_shapes_are_those_of_bit(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    shapes = {name: array.shape for name, array in arrays_of(path).items()}
    assert {name: shape for name, shape in shapes.items() if "/block2/" not in name} == SHAPES
    second = {
        name.removeprefix("resnet/block2/"): shape for name, shape in shapes.items() if "block2" in name
    }
    assert second["unit01/a/proj/standardized_conv2d/kernel"] == (1, 1, 128, 256)
    assert second["unit02/a/standardized_conv2d/kernel"] == (1, 1, 256, 64)
    assert "unit02/a/proj/standardized_conv2d/kernel" not in second and len(second) == 10 + 9


@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_round_trip_changes_no_bit(tmp_path: Path, with_metadata: bool) -> None:
    model, path = exported(tmp_path)
    if with_metadata:
        back = load_model(import_model(path, tmp_path / "back.safetensors", format="npz"))
        assert back.config == TINY
    else:
        back = imported(tmp_path, arrays_of(path), "model.image_size=40")
        assert back.config == TINY
    assert same_weights(back, model)
    again = arrays_of(export_model(tmp_path / "back.safetensors", tmp_path / "again.npz"))
    first = arrays_of(path)
    assert again.keys() == first.keys() and all(np.array_equal(again[name], first[name]) for name in again)


def test_numbered_layers_and_norms_of_four_axes_are_read(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    arrays = {}
    for number, (name, array) in enumerate(arrays_of(path).items()):
        if "/group_norm/" in name:
            array = array[None, None, None]
        if "block2" in name:
            name = name.replace("/standardized_conv2d/", f"/standardized_conv2d_{number}/")
        arrays[name] = array
    assert same_weights(imported(tmp_path, arrays, "model.image_size=40"), model)


def test_a_published_size_is_named_and_one_without_a_head_has_none(tmp_path: Path) -> None:
    config = ResNetConfig(variant="R26x1", num_classes=0)
    _, path = exported(tmp_path, config)
    assert imported(tmp_path, arrays_of(path)).config == config
    assert not [name for name in arrays_of(path) if "/head/" in name]


def change(name: str, array: np.ndarray | None) -> Any:
    def changed(arrays: Arrays) -> Arrays:
        others = {key: value for key, value in arrays.items() if key != name}
        return others if array is None else others | {name: array}

    return changed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(f"{UNIT}/b/group_norm/beta", None), "there is no .*unit01/b/group_norm/beta, .* in a ResNet"),
        (change(f"{UNIT}/d/x", np.ones(3, np.float32)), "unit01/d/x has no place in a ResNet"),
        (change("resnet/head/conv2d/bias", np.ones(4, np.float32)), "head/conv2d/kernel is .* but"),
        (change(f"{UNIT}/a/standardized_conv2d/kernel", None), "not those of a BiT ResNet"),
        (
            change("resnet/root_block/standardized_conv2d/kernel", np.ones((7, 7, 1, 32), np.float32)),
            "is for images of 1 channel, but",
        ),
        (
            change("resnet/root_block/standardized_conv2d/kernel", np.ones((7, 7, 3, 48), np.float32)),
            "model.width 48 must be a multiple of 32",
        ),
        (
            change(f"{UNIT}/a/standardized_conv2d_7/kernel", np.ones((1, 1, 32, 32), np.float32)),
            "some layers are there under two numbers",
        ),
        (
            lambda arrays: {
                name.replace("root_block/standardized_conv2d", "root_block/conv"): array
                for name, array in arrays.items()
            },
            "holds no resnet/root_block/standardized_conv2d/kernel, which every BiT ResNet has",
        ),
    ],
)
def test_files_that_hold_no_whole_resnet_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    _, path = exported(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=rf"google.npz.*{message}"):
        imported(tmp_path, edit(arrays_of(path)))


def test_what_only_vits_have_is_refused(tmp_path: Path) -> None:
    _, npz = exported(tmp_path)
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out"
    for format in ("timm", "transformers"):
        with pytest.raises(
            CheckpointError, match=f"'resnet' cannot be exported to {format}; use --format npz"
        ):
            export_model(ours, out, format=format)
    with pytest.raises(ConfigError, match=r"--dialect linen is of ViTs; .* drop it"):
        export_model(ours, tmp_path / "out.npz", dialect="linen")
    with pytest.raises(CheckpointError, match="--pixels imagenet cannot be folded into a ResNet"):
        import_model(npz, out, format="npz", pixels="imagenet")
    assert not out.exists()
