"""Imports of DINOv2, DeiT III and models with registers, checked by the code they come from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import OUR_PIXELS, TINY, images, logits, randomise, saved_model
from safetensors.torch import load, save_file

from vitscale import load_model
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import build_model
from vitscale.models.flops import forward_macs
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.convert import export_model, import_model

TINY_SIZES = {
    key: getattr(TINY, key)
    for key in ("width", "depth", "num_heads", "mlp_dim", "patch_size", "image_size", "num_classes")
}
SIZES = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_small_patch14_dinov2", {"init_values": 1e-5}),
        ("vit_small_patch14_reg4_dinov2", {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True}),
        ("vit_small_patch14_reg4_dinov2", {"init_values": None, "reg_tokens": 3, "no_embed_class": False}),
        ("deit3_small_patch16_224", {"init_values": 1e-6, "no_embed_class": True}),
        ("deit3_small_patch16_224", {"init_values": 1e-6, "no_embed_class": True, "img_size": (8, 12)}),
        (
            "vit_small_patch14_reg4_dinov2",
            {"init_values": None, "reg_tokens": 3, "no_embed_class": False, "img_size": (8, 20)},
        ),
    ],
)
def test_timms_models_keep_their_outputs(
    tmp_path: Path, timm: Any, architecture: str, arguments: dict[str, Any]
) -> None:
    arguments = SIZES | arguments
    other = randomise(timm.create_model(architecture, num_classes=5, **arguments))
    timm.models.save_for_hf(
        other, tmp_path / "timm", model_args=arguments, data_config=OUR_PIXELS, safe_serialization=True
    )
    model = load_model(import_model(tmp_path / "timm", tmp_path / "ours", format="timm"))
    assert model.config.num_registers == arguments.get("reg_tokens", 0)
    assert (logits(model, model.config) - logits(other, model.config)).abs().max() < 1e-5
    pixels = images(model.config)
    with torch.no_grad():
        patches = other.forward_features(pixels)[:, other.num_prefix_tokens :]
        assert (model.features(pixels, tokens=True) - patches).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_transformers_dinov2_keeps_its_outputs(tmp_path: Path, transformers: Any, kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    config = getattr(transformers, f"{kind}Config")(image_size=12, patch_size=4, **sizes)
    other = randomise(getattr(transformers, f"{kind}Model")(config))
    other.save_pretrained(tmp_path / "hf")
    model = load_model(import_model(tmp_path / "hf", tmp_path / "ours", format="transformers", pixels="half"))
    assert model.config.num_registers == (4 if kind == "Dinov2WithRegisters" else 0)
    assert model.config.norm_eps == 1e-6 and model.config.gelu == "exact"
    with torch.no_grad():
        outputs = other(images(TINY)).last_hidden_state
        assert (model.features(images(TINY)) - outputs[:, 0]).abs().max() < 1e-5
        first = 1 + model.config.num_registers
        assert (model.features(images(TINY), tokens=True) - outputs[:, first:]).abs().max() < 1e-5


def test_a_dinov2_classifier_over_two_vectors_is_refused(tmp_path: Path, transformers: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_ratio": 2}
    config = transformers.Dinov2Config(image_size=12, patch_size=4, num_labels=5, **sizes)
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"classifier.weight is \(5, 64\), but \(5, 32\)"):
        import_model(tmp_path / "hf", tmp_path / "ours", format="transformers")


def test_a_layer_scale_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    tensors = load((out / "model.safetensors").read_bytes())  # load_file may map what is then written over
    for gamma in (torch.ones(31), torch.ones(1)):
        save_file(tensors | {"blocks.0.ls2.gamma": gamma}, out / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"ls2.gamma is .* does not fit blocks.0.mlp.fc2.weight"):
            import_model(out, tmp_path / "back", format="timm")
    save_file(tensors | {"blocks.0.ls2.gamma": torch.full((32,), 2.0)}, out / "model.safetensors")
    back = load_model(import_model(out, tmp_path / "back", format="timm"))
    model = load_model(tmp_path / "ours.safetensors")
    assert torch.equal(back.blocks[0].mlp.fc2.weight, 2 * model.blocks[0].mlp.fc2.weight)
    assert torch.equal(back.blocks[0].mlp.fc2.bias, 2 * model.blocks[0].mlp.fc2.bias)


# models with registers of our own


def test_registers_take_part_in_attention_alone() -> None:
    config = ViTConfig(**{**TINY_SIZES, "pool": "mean", "num_registers": 3})
    model = build_model(config, seed=0)
    assert model.pos_embed.shape == (1, 9, 32) and model.reg_token.shape == (1, 3, 32)
    assert 0 < model.reg_token.std() < 1e-5
    randomise(model)
    with torch.no_grad():
        before, patches = model.features(images(TINY)), model.features(images(TINY), tokens=True)
        assert patches.shape == (3, 9, 32) and torch.allclose(patches.mean(1), before)
        model.reg_token *= -1
        assert (model.features(images(TINY)) - before).abs().max() > 1e-3
    without = dataclasses.replace(config, num_registers=0)
    block = 4 * 32**2 + 2 * 32 * 80
    more = 2 * (3 * block + 2 * 32 * (12**2 - 9**2))
    assert forward_macs(config) - forward_macs(without) == more


@pytest.mark.parametrize("format", ["timm", "transformers", "npz"])
def test_an_export_without_registers_is_refused(tmp_path: Path, format: Any) -> None:
    saved_model(tmp_path / "ours.safetensors", ViTConfig(**TINY_SIZES, num_registers=2))
    out = tmp_path / ("a.npz" if format == "npz" else "a")
    with pytest.raises(CheckpointError, match=r"model.num_registers 2 cannot be exported to"):
        export_model(tmp_path / "ours.safetensors", out, format=format)
    saved_model(tmp_path / "plain.safetensors")
    out = export_model(tmp_path / "plain.safetensors", out, format=format)
    with pytest.raises((CheckpointError, ConfigError), match=r"num_registers 1 must|no .*reg(ist|_tok)"):
        import_model(out, tmp_path / "b", format=format, overrides=["model.num_registers=1"])
