"""Exports and imports, tested by what matters: the other library computes the same logits."""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import TINY, images, logits, randomise, resolved, same_weights, saved_model
from safetensors.torch import load_file, save_file

from vitscale import load_model
from vitscale.data.transforms import evaluation_view, normalize
from vitscale.errors import CheckpointError, ConfigError
from vitscale.image_size import ImageSize
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.convert import export_model, import_model
from vitscale.weights.saved import SavedModel

ROOT = Path(__file__).resolve().parents[2]


# timm


@pytest.mark.parametrize(
    ("pool", "gelu", "size"),
    [
        ("token", "tanh", 12),
        ("token", "exact", (8, 16)),  # with the token, 9 positions: no square of patches
        ("token", "exact", (20, 8)),
        ("mean", "tanh", 12),
        ("mean", "tanh", (16, 4)),
        ("map", "exact", (4, 8)),
    ],
)
def test_timm_computes_the_logits_of_an_export(
    tmp_path: Path, timm: Any, pool: str, gelu: str, size: ImageSize
) -> None:
    config = dataclasses.replace(TINY, pool=pool, gelu=gelu, image_size=size)
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert (logits(model, config) - logits(other, config)).abs().max() < 1e-5
    values = json.loads((out / "config.json").read_text())
    by_hand = timm.create_model(
        values["architecture"],
        num_classes=5,
        checkpoint_path=out / "model.safetensors",
        **values["model_args"],
    ).eval()
    assert torch.equal(logits(by_hand, config), logits(other, config))
    back = load_model(import_model(out, tmp_path / "back", format="timm"))
    assert same_weights(back, model) and resolved(back.config) == resolved(config)


@pytest.mark.parametrize(
    ("pool", "arguments"),
    [
        ("token", {"global_pool": "token"}),
        ("token", {"global_pool": "token", "act_layer": "gelu_tanh"}),
        ("mean", {"global_pool": "avg", "class_token": False, "fc_norm": False}),
        ("map", {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"}),
    ],
)
def test_an_import_computes_the_logits_of_timm(
    tmp_path: Path, timm: Any, pool: str, arguments: dict[str, Any]
) -> None:
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
    other = randomise(timm.create_model("vit_base_patch16_224", num_classes=5, **sizes, **arguments))
    folder, arguments = tmp_path / "timm", {**sizes, **arguments}
    timm.models.save_for_hf(other, folder, model_args=arguments, safe_serialization=True)
    model = load_model(import_model(tmp_path / "timm", tmp_path / "ours", format="timm"))
    assert model.config.pool == pool
    assert (logits(model, TINY) - logits(other, TINY)).abs().max() < 1e-5
    again = export_model(tmp_path / "ours", tmp_path / "again", format="timm")
    theirs, ours = load_file(tmp_path / "timm" / "model.safetensors"), load_file(again / "model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_what_a_timm_architecture_implies_is_known(tmp_path: Path, timm: Any) -> None:
    for name in (
        "vit_base_patch16_siglip_224",
        "vit_so400m_patch16_siglip_256",
        "vit_large_patch16_siglip_512",
        "vit_giantopt_patch16_siglip_gap_256",
        "vit_base_patch16_gap_224",
    ):
        narrow = {"img_size": 32, "embed_dim": 192, "depth": 1}
        other = timm.create_model(name, num_classes=0, **narrow)
        save_file(other.state_dict(), tmp_path / "model.safetensors")
        values = {"architecture": name, "global_pool": other.global_pool}
        (tmp_path / "config.json").write_text(json.dumps(values))
        heads = other.blocks[0].attn.num_heads
        overrides = [] if "gap" in name else [f"model.num_heads={heads}"]
        path = import_model(tmp_path, tmp_path / "out", format="timm", overrides=overrides, pixels="half")
        config = SavedModel(path).config
        assert config.resolved_num_heads == heads, name
        tanh = "Tanh" in repr(other.blocks[0].mlp.act) or "tanh" in repr(other.blocks[0].mlp.act)
        assert config.gelu == ("tanh" if tanh else "exact"), name


def test_a_known_model_has_timms_name_for_it(tmp_path: Path) -> None:
    config = ViTConfig(variant="Ti/16", image_size=32, num_classes=3)
    saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    assert json.loads((out / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    back = SavedModel(import_model(out, tmp_path / "back", format="timm"))
    assert back.config == dataclasses.replace(config, gelu="tanh")


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_the_gelu_of_a_model_like_siglip_is_asked_for_where_no_file_says_it(
    tmp_path: Path, pool: str
) -> None:
    model = saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, pool=pool))
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    (out / "config.json").unlink()
    heads = "model.num_heads=4"
    with pytest.raises(CheckpointError, match=r'says model.gelu; add model.gelu=... \("tanh" or "exact"'):
        import_model(out, tmp_path / "back", format="timm", overrides=[heads])
    given = [heads, "model.gelu=tanh"]
    back = import_model(out, tmp_path / "back", format="timm", overrides=given, pixels="half")
    assert torch.equal(logits(load_model(back), TINY), logits(model, TINY))


def test_dino_imports_without_a_config_and_with_its_prefix(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, num_classes=0, gelu="exact")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    state = load_file(out / "model.safetensors")
    save_file(
        {f"module.backbone.{name}": value for name, value in state.items()}, tmp_path / "dino.safetensors"
    )
    path = import_model(
        tmp_path / "dino.safetensors",
        tmp_path / "dino",
        format="timm",
        overrides=["model.num_heads=4"],
        pixels="half",
    )
    assert same_weights(load_model(path), model)
    assert resolved(SavedModel(path).config) == resolved(config)
    with pytest.raises(
        CheckpointError, match=r"no file beside the weights says model.num_heads; add .* often 1"
    ):
        import_model(tmp_path / "dino.safetensors", tmp_path / "guessed", format="timm")


def test_the_page_on_pickles_converts_what_timms_training_writes(
    tmp_path: Path, timm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
    other = randomise(timm.create_model("vit_base_patch16_224", num_classes=5, **sizes))
    saver = importlib.import_module("timm.utils").CheckpointSaver(
        other,
        torch.optim.SGD(other.parameters(), momentum=0.9),
        args=argparse.Namespace(model="vit_base_patch16_224"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    monkeypatch.chdir(tmp_path)
    _, section = (ROOT / "docs" / "checkpoints.md").read_text().split("### Pickles")
    exec(section.split("```")[1].removeprefix("python"), {})
    heads = ["model.num_heads=4"]
    path = import_model("model.safetensors", "ours", format="timm", overrides=heads, pixels="half")
    assert (logits(load_model(path), TINY) - logits(other, TINY)).abs().max() < 1e-5


def test_names_that_a_wrapper_put_a_word_before_are_read(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "ours.safetensors")
    timm = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    for format, prefix, file in (
        ("timm", "_orig_mod.", timm / "model.safetensors"),  # torch.compile
        ("timm", "model.", timm / "model.safetensors"),  # a usual LightningModule
        ("safetensors", "module._orig_mod.", tmp_path / "ours.safetensors"),  # compiled, then in DDP
        ("safetensors", "_orig_mod.module.", tmp_path / "ours.safetensors"),
    ):
        wrapped = {prefix + name: value for name, value in load_file(file).items()}
        save_file(wrapped, tmp_path / "x.safetensors")
        path = import_model(
            tmp_path / "x.safetensors",
            tmp_path / "x",
            format=format,
            overrides=["model.num_heads=4"],
            pixels="half",
        )
        assert same_weights(load_model(path), model), prefix


def test_the_size_of_images_that_are_no_squares_is_asked_for_where_no_file_says_it(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, image_size=(8, 12), gelu="exact")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    (out / "config.json").unlink()
    heads = "model.num_heads=4"
    message = r"pos_embed is for 6 patches, .* add model.image_size=\[HEIGHT,WIDTH\], .* of 4 x 4 pixels"
    with pytest.raises(CheckpointError, match=message):
        import_model(out, tmp_path / "back", format="timm", overrides=[heads])
    with pytest.raises(CheckpointError, match=r"make no square nor images of 12 x 12 pixels"):
        wrong = [heads, "model.image_size=[12,12]"]
        import_model(out, tmp_path / "back", format="timm", overrides=wrong)
    right = [heads, "model.image_size=[8,12]"]
    back = load_model(import_model(out, tmp_path / "back", format="timm", overrides=right, pixels="half"))
    assert back.config.image_size == (8, 12)
    assert torch.equal(logits(back, config), logits(model, config))


# transformers


@pytest.mark.parametrize(("gelu", "size"), [("tanh", 12), ("exact", (8, 16)), ("exact", (36, 4))])
def test_transformers_computes_the_logits_of_an_export(
    tmp_path: Path, transformers: Any, gelu: str, size: ImageSize
) -> None:
    # An epsilon that is large enough to change the logits.
    config = dataclasses.replace(TINY, gelu=gelu, norm_eps=1e-3, image_size=size)
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    other, info = transformers.ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and other.num_labels == 5
    with torch.no_grad():
        assert (logits(model, config) - other(images(config)).logits).abs().max() < 1e-5
    back = load_model(import_model(out, tmp_path / "back", format="transformers"))
    assert same_weights(back, model) and resolved(back.config) == resolved(config)


@pytest.mark.parametrize("size", [12, (8, 16)])
def test_transformers_prepares_images_as_our_evaluations_do(
    tmp_path: Path, transformers: Any, size: ImageSize
) -> None:
    saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, image_size=size))
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(out)(images=pixels, return_tensors="pt")
    ours = normalize(evaluation_view(pixels, "resize", size)[None], torch.float32)
    assert (theirs["pixel_values"] - ours).abs().max() < 2.1 / 127.5  # rounding of resized pixels


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_an_import_computes_the_logits_of_transformers(tmp_path: Path, transformers: Any, act: str) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, hidden_act=act,
        image_size=12, patch_size=4, num_labels=3,
    )  # fmt: skip
    other = randomise(transformers.ViTForImageClassification(config))
    other.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    model = load_model(import_model(tmp_path / "hf", tmp_path / "ours", format="transformers", pixels="half"))
    assert (model.config.norm_eps, model.config.num_classes) == (1e-12, 3)
    with torch.no_grad():
        assert (logits(model, TINY) - other(images(TINY)).logits).abs().max() < 1e-5


def test_transformers_pooler_is_our_tanh_layer(tmp_path: Path, transformers: Any) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=12,
        patch_size=4, pooler_output_size=24,
    )  # fmt: skip
    other = randomise(transformers.ViTModel(config))
    other.save_pretrained(tmp_path / "hf")
    model = load_model(import_model(tmp_path / "hf", tmp_path / "ours", format="transformers", pixels="half"))
    assert (model.config.representation_size, model.config.num_classes) == (24, 0)
    with torch.no_grad():
        assert (logits(model, TINY) - other(images(TINY)).pooler_output).abs().max() < 1e-5


# shards, and the command line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pool=mean", "model.pool 'mean' must be 'token': models of transformers have no other"),
        ("model.num_patch_outputs=4", "model.num_patch_outputs 4 must be 0: models of transformers have"),
    ],
)
def test_a_key_that_models_of_a_library_do_not_have_is_named(
    tmp_path: Path, override: str, message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors")
    hf = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    with pytest.raises(ConfigError, match=message):
        import_model(hf, tmp_path / "out", format="transformers", overrides=[override])
    assert import_model(hf, tmp_path / "out", format="transformers", overrides=["model.pool=token"]).exists()


@pytest.mark.parametrize("format", ["safetensors", "transformers"])
def test_shards_are_hugging_faces_and_ours(tmp_path: Path, transformers: Any, format: Any) -> None:
    config = ViTConfig(variant="Ti/16", depth=2, image_size=32, num_classes=3)
    model = saved_model(tmp_path / "ours.safetensors", config)
    export_model(tmp_path / "ours.safetensors", tmp_path / "out", format=format, shard_mb=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * sum(param.numel() for param in model.parameters())
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(value.nbytes for value in tensors.values()) <= 1e6 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
    if format == "transformers":
        other = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert (other(images(config)).logits - logits(model, config)).abs().max() < 1e-5
    else:
        assert same_weights(load_model(tmp_path / "out"), model)
    back = import_model(tmp_path / "out", tmp_path / "back", format=format)
    assert same_weights(load_model(back), model)


def test_the_command_line_exports_imports_and_averages(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "a.safetensors")
    script = (
        "import sys; sys.path.insert(0, '.'); sys.path.insert(0, 'tools'); import checkpoint, shlex\n"
        "for line in sys.stdin: print(checkpoint.main(shlex.split(line)))"
    )
    commands = f"""export {tmp_path}/a.safetensors {tmp_path}/big.npz --format npz --dialect big_vision
        import {tmp_path}/big.npz {tmp_path}/back --format npz model.dropout=0.1 model.head_bias=-1
        average {tmp_path}/a.safetensors {tmp_path}/back {tmp_path}/mean.safetensors
        average {tmp_path}/a.safetensors {tmp_path}/mean2.safetensors
        import {tmp_path}/big.npz {tmp_path}/other --format npz model.nonsense=1"""
    result = subprocess.run(
        [sys.executable, "-c", script], input=commands, capture_output=True, text=True, cwd=ROOT, check=True
    )
    out = ["big.npz", "back/model.safetensors", "mean.safetensors"]
    assert result.stdout.split() == [word for name in out for word in (f"{tmp_path}/{name}", "0")] + [
        "2",
        "2",
    ]
    assert "average needs two checkpoints or more" in result.stderr
    assert "unknown key model.nonsense in [model]" in result.stderr
    back = load_model(tmp_path / "back")
    assert (back.config.dropout, back.config.head_bias) == (0.1, -1)
    assert torch.equal(logits(back, TINY), logits(model, TINY))
