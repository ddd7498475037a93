"""Exports to ONNX, by what onnxruntime makes of them."""

import dataclasses
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from foreign_models import TINY, images, logits, saved_model

from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.hybrid import HybridConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit import ViT
from vitscale.weights.foreign.convert import export_model

ONE_BLOCK = dataclasses.replace(TINY, depth=1)


AXIAL = dataclasses.replace(ONE_BLOCK, pool="mean", attention="axial", depth=2)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (dataclasses.replace(ONE_BLOCK, representation_size=24), "a.onnx"),
        (dataclasses.replace(ONE_BLOCK, distilled=True), "a.onnx"),
        (dataclasses.replace(ONE_BLOCK, pool="map", posemb="sincos2d", image_size=(8, 12)), "a.onnx"),
        (dataclasses.replace(ONE_BLOCK, posemb="relative"), "a.onnx"),
        (dataclasses.replace(AXIAL, image_size=(8, 12)), "a.onnx"),
        (dataclasses.replace(ONE_BLOCK, num_classes=0, pool="mean", num_registers=2), "folder"),
        (ResNetConfig(width=32, stages=(1, 2), image_size=40, num_classes=5), "a.onnx"),
        (HybridConfig(variant="R+mu/16", image_size=64, num_classes=3), "a.onnx"),
    ],
)
def test_onnxruntime_computes_the_outputs(tmp_path: Path, caplog: Any, config: Any, name: str) -> None:
    caplog.set_level("INFO")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / name, format="onnx")
    assert caplog.text == ""
    found = session(out)
    assert [node.name for node in found.get_outputs()] == ["logits" if config.num_classes else "features"]
    for count in (1, 4):  # another size than that of the exporter's example
        (outputs,) = found.run(None, {"images": images(config, count).numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(outputs) - model(images(config, count))).abs().max() < 1e-5
    assert '"width": ' in found.get_modelmeta().custom_metadata_map["vitscale.model"]
    if name == "folder":
        assert {path.name for path in out.parent.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors", ONE_BLOCK, seed=1)
    out = tmp_path / "a.onnx"
    export_model(tmp_path / "ours.safetensors", out)
    model = saved_model(tmp_path / "ours.safetensors", ONE_BLOCK, seed=2)
    export_model(tmp_path / "ours.safetensors", out)
    (outputs,) = session(out).run(None, {"images": images(TINY).numpy()})
    assert (torch.from_numpy(outputs) - logits(model, TINY)).abs().max() < 1e-5
    out.write_bytes(b"another model")
    with pytest.raises(CheckpointError, match="not an export of vitscale; name a new file"):
        export_model(tmp_path / "ours.safetensors", out)
    assert out.read_bytes() == b"another model"


def test_an_export_with_other_outputs_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter bakes in what Python decides: here, whether it is being exported."""
    pool = ViT._pool

    def changed(self: ViT, x: torch.Tensor) -> torch.Tensor:
        return pool(self, x) * (1.01 if torch.compiler.is_compiling() else 1.0)

    saved_model(tmp_path / "ours.safetensors", ONE_BLOCK)
    monkeypatch.setattr(ViT, "_pool", changed)
    with pytest.raises(CheckpointError, match="onnxruntime's outputs for 1 images differ"):
        export_model(tmp_path / "ours.safetensors", tmp_path / "a.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.onnx", {"dtype": "bf16"}, "an ONNX file is fp32 and whole; drop --dtype"),
        ("a.onnx", {"shard_mb": 1}, "an ONNX file is fp32 and whole"),
        ("a.pt", {"format": "onnx"}, "has the name of a .pt file; end it in .onnx"),
    ],
)
def test_what_onnx_cannot_be_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors", ONE_BLOCK)
    with pytest.raises(ConfigError, match=message):
        export_model(tmp_path / "ours.safetensors", tmp_path / name, **options)
