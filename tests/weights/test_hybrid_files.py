"""Hybrids in Google's .npz files both ways, and from timm: the same logits on both sides."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_models import arrays_of, flax_logits, images, imported, logits, same_weights, saved_model
from safetensors.torch import save_file
from torch import Tensor

from vitscale import load_model
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import ModelConfig
from vitscale.models.hybrid import HybridConfig
from vitscale.weights.foreign.convert import export_model, import_model

# Patches of 2 x 2 places of a map with a place to 8 pixels.
TINY = HybridConfig(
    variant="R+B/16",
    stem_width=32,
    stem_stages=(1, 2),
    patch_size=16,
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=80,
    image_size=48,
    num_classes=5,
)
ROOT_ONLY = dataclasses.replace(TINY, stem_stages=(), patch_size=8, image_size=24)
EVERY_STAGE = dataclasses.replace(TINY, stem_stages=(2, 1, 1), image_size=32)


def exported(folder: Path, config: ModelConfig = TINY, **options: Any) -> tuple[Any, Path]:
    """A random model, and its .npz file."""
    model = saved_model(folder / "ours.safetensors", config)
    return model, export_model(folder / "ours.safetensors", folder / "ours.npz", **options)


class GooglesConv(torch.nn.Conv2d):
    """Google's standardisation, of which timm has other epsilons."""

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers import pad_same

        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        x = pad_same(x, list(self.kernel_size), list(self.stride))
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), None, self.stride)


def timm_hybrid(timm: Any, config: HybridConfig, conv: Any, norm_eps: float) -> Any:
    """timm's hybrid of these sizes."""
    stages, width = config.resolved_stem_stages, config.resolved_stem_width
    if stages:
        backbone = timm.models.resnetv2.ResNetV2(
            layers=stages,
            channels=[4 * width * 2**stage for stage in range(len(stages))],
            num_classes=0,
            global_pool="",
            stem_chs=width,
            stem_type="same",
            preact=False,
            conv_layer=conv,
        )
    else:
        backbone = timm.models.resnetv2.create_resnetv2_stem(
            3, width, stem_type="same", preact=False, conv_layer=conv
        )
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_places,
        num_classes=config.num_classes,
        embed_dim=config.resolved_width,
        depth=config.resolved_depth,
        num_heads=config.resolved_num_heads,
        mlp_ratio=config.resolved_mlp_dim / config.resolved_width,
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
        embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone),
    )
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = norm_eps
    return model.eval()


@pytest.mark.parametrize("config", [TINY, ROOT_ONLY, EVERY_STAGE], ids=["patches", "root", "stages"])
@pytest.mark.parametrize("dialect", ["original", "linen"])
def test_googles_model_computes_the_logits_of_an_export(
    tmp_path: Path, config: HybridConfig, dialect: str
) -> None:
    model, path = exported(tmp_path, config, dialect=dialect)
    arrays = {name: torch.from_numpy(array) for name, array in arrays_of(path).items()}
    expected = flax_logits(arrays, images(config), "token")
    torch.testing.assert_close(logits(model, config), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("config", [TINY, ROOT_ONLY, EVERY_STAGE], ids=["patches", "root", "stages"])
def test_timm_reads_an_export_and_with_googles_epsilons_computes_its_logits(
    tmp_path: Path, timm: Any, config: HybridConfig
) -> None:
    model, path = exported(tmp_path, config)
    other = timm_hybrid(timm, config, GooglesConv, norm_eps=1e-6)
    other.load_pretrained(path)
    expected = logits(model, config)
    assert (logits(other, config) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "variant", "size"),
    [("vit_tiny_r_s16_p8_224", "R+Ti/16", 224), ("vit_small_r26_s32_224", "R26+S/32", 224)],
)
def test_timms_own_hybrids_differ_by_their_epsilons_alone(
    tmp_path: Path, timm: Any, name: str, variant: str, size: int
) -> None:
    config = HybridConfig(variant=variant, image_size=size, num_classes=10)
    model, path = exported(tmp_path, config)
    other = timm.create_model(name, num_classes=10, act_layer="gelu_tanh")
    other.load_pretrained(path)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
    expected = logits(model, config)
    assert (logits(other.eval(), config) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("config", [TINY, ROOT_ONLY, EVERY_STAGE], ids=["patches", "root", "stages"])
def test_timms_weights_are_imported_with_a_warning_about_its_epsilons(
    tmp_path: Path, timm: Any, config: HybridConfig, caplog: pytest.LogCaptureFixture
) -> None:
    other = timm_hybrid(timm, config, partial(timm.layers.StdConv2dSame, eps=1e-8), norm_eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in other.parameters():
            param.copy_(0.2 * torch.randn(param.shape, generator=generator) + 0.1)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    overrides = ["model.num_heads=4", "model.gelu=tanh"]
    path = import_model(tmp_path, tmp_path / "ours", format="timm", overrides=overrides, pixels="half")
    ours = load_model(path)
    assert isinstance(ours.config, HybridConfig)
    assert ours.config == dataclasses.replace(config, variant="R+B/16")
    expected = logits(other, config)
    assert (logits(ours, config) - expected).abs().max() < 0.01 * expected.abs().max()
    assert "timm computes hybrids with other epsilons" in caplog.text


def test_names_and_shapes_are_googles(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    shapes = {name: array.shape for name, array in arrays_of(path).items()}
    stem = {name: shape for name, shape in shapes.items() if name.startswith(("conv_", "gn_", "block"))}
    assert {name: shape for name, shape in stem.items() if "block2" not in name} == {
        "conv_root/kernel": (7, 7, 3, 32),
        "gn_root/scale": (32,),
        "gn_root/bias": (32,),
        "block1/unit1/conv_proj/kernel": (1, 1, 32, 128),
        "block1/unit1/gn_proj/scale": (128,),
        "block1/unit1/gn_proj/bias": (128,),
        "block1/unit1/conv1/kernel": (1, 1, 32, 32),
        "block1/unit1/gn1/scale": (32,),
        "block1/unit1/gn1/bias": (32,),
        "block1/unit1/conv2/kernel": (3, 3, 32, 32),
        "block1/unit1/gn2/scale": (32,),
        "block1/unit1/gn2/bias": (32,),
        "block1/unit1/conv3/kernel": (1, 1, 32, 128),
        "block1/unit1/gn3/scale": (128,),
        "block1/unit1/gn3/bias": (128,),
    }
    assert stem["block2/unit1/conv_proj/kernel"] == (1, 1, 128, 256)
    assert stem["block2/unit2/conv1/kernel"] == (1, 1, 256, 64) and "block2/unit3/conv1/kernel" not in stem
    assert shapes["embedding/kernel"] == (2, 2, 256, 32)
    assert shapes["Transformer/posembed_input/pos_embedding"] == (1, 10, 32)


@pytest.mark.parametrize("config", [TINY, ROOT_ONLY], ids=["patches", "root"])
@pytest.mark.parametrize("dialect", ["original", "linen"])
def test_a_round_trip_changes_no_bit(tmp_path: Path, config: HybridConfig, dialect: str) -> None:
    model, path = exported(tmp_path, config, dialect=dialect)
    assert load_model(import_model(path, tmp_path / "named", format="npz")).config == config
    back = imported(tmp_path, arrays_of(path))
    assert back.config == config and same_weights(back, model)
    again = arrays_of(export_model(tmp_path / "back.safetensors", tmp_path / "again.npz", dialect=dialect))
    first = arrays_of(path)
    assert again.keys() == first.keys() and all(np.array_equal(again[name], first[name]) for name in again)


def test_norms_of_four_axes_are_read(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    arrays = arrays_of(path)
    norms = [name for name in arrays if "/gn" in f"/{name}"]
    assert len(norms) == 2 + 3 * 6 + 2 * 2
    arrays |= {name: arrays[name][None, None, None] for name in norms}
    assert same_weights(imported(tmp_path, arrays), model)


@pytest.mark.parametrize("variant", ["R+mu/16", "R26+mu/32", "R50+mu/16"])
def test_a_published_stem_is_named(tmp_path: Path, variant: str) -> None:
    config = HybridConfig(variant=variant, image_size=64, num_classes=3, representation_size=7)
    _, path = exported(tmp_path, config)
    assert imported(tmp_path, arrays_of(path)).config == config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"block1/unit1/gn3/bias": None}, "there is no block1/unit1/gn3/bias, which is .* in a hybrid"),
        ({"block1/unit1/extra": np.ones(3, "f4")}, "block1/unit1/extra has no place in a hybrid"),
        ({"block1/unit1/conv1/kernel": None}, "model.patch_size|no place in a hybrid|is .* but"),
        ({"conv_root/kernel": np.ones((7, 7, 1, 32), "f4")}, "is for images of 1 channel, but"),
        ({"conv_root/kernel": np.ones((7, 7, 3, 48), "f4")}, "model.stem_width 48 must be a multiple of 32"),
        ({"conv_root/kernel": np.ones(3, "f4")}, "not those of a ViT or hybrid"),
        ({"embedding/kernel": np.ones((2, 2, 255, 32), "f4")}, "embedding/kernel is .* but"),
    ],
)
def test_files_that_hold_no_whole_hybrid_are_refused(
    tmp_path: Path, edit: dict[str, np.ndarray | None], message: str
) -> None:
    _, path = exported(tmp_path)
    arrays = {name: array for name, array in (arrays_of(path) | edit).items() if array is not None}
    with pytest.raises((CheckpointError, ConfigError), match=rf"google.npz: .*({message})"):
        imported(tmp_path, arrays)


def test_too_many_stages_are_refused_without_counting_them_all(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    more = {f"block{stage}/unit1/conv1/kernel": np.ones((1, 1, 1, 1), "f4") for stage in range(3, 99)}
    with pytest.raises(
        ConfigError, match=r"model.stem_stages \[1, 2, 1, 1, 1, 1, 1, 1, 1\] must be at most 8"
    ):
        imported(tmp_path, arrays_of(path) | more)


def test_what_other_formats_cannot_hold_is_refused(tmp_path: Path) -> None:
    _, npz = exported(tmp_path)
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out"
    for format in ("timm", "transformers"):
        with pytest.raises(
            CheckpointError, match=f"'hybrid' cannot be exported to {format}, .*use --format npz"
        ):
            export_model(ours, out, format=format)
    pooled = tmp_path / "pooled.safetensors"
    saved_model(pooled, dataclasses.replace(TINY, pool="map"))
    with pytest.raises(CheckpointError, match=r"model.pool 'map' cannot .*; use --format safetensors"):
        export_model(pooled, tmp_path / "out.npz")
    with pytest.raises(CheckpointError, match="'hybrid' cannot be exported to big_vision"):
        export_model(ours, tmp_path / "out.npz", dialect="big_vision")
    with pytest.raises(CheckpointError, match="--pixels imagenet cannot be folded into a ResNet"):
        import_model(npz, out, format="npz", pixels="imagenet")
    assert not out.exists() and not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("kind", ["hybrid", "resnet"])
def test_metadata_of_a_kind_that_the_names_do_not_have_are_refused(tmp_path: Path, kind: str) -> None:
    from foreign_models import TINY as VIT

    saved_model(tmp_path / "vit.safetensors", VIT)
    hf = export_model(tmp_path / "vit.safetensors", tmp_path / "hf", format="transformers")
    from safetensors.torch import load_file

    tensors = load_file(hf / "model.safetensors")
    save_file(
        tensors, hf / "model.safetensors", {"vitscale.model": json.dumps({"kind": kind, "num_classes": 5})}
    )
    with pytest.raises(CheckpointError, match=f"model.kind is '{kind}', but the tensors have names of a ViT"):
        import_model(hf, tmp_path / "out", format="transformers", overrides=["model.image_size=32"])
