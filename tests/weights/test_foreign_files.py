"""Files of exports and imports: rounded to nearest, complete or absent, refused if wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import OUR_PIXELS, TINY, same_weights, saved_model
from make import state_of, write_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.checkpoint import main
from vitscale import load_model
from vitscale.checkpoint.safetensors import SafetensorsReader
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.vit_config import ViTConfig
from vitscale.weights import publish
from vitscale.weights.files import Weights, write_folder
from vitscale.weights.foreign.convert import export_model, import_model
from vitscale.weights.saved import SavedModel


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("format", ["safetensors", "timm", "transformers"])
def test_16_bit_exports_round_to_nearest(tmp_path: Path, format: Any, dtype: Any) -> None:
    model = saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "out", format=format, dtype=dtype)
    file = tmp_path / "out" / "model.safetensors"
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {value.dtype for value in load_file(file).values()} == {torch_dtype}
    assert SafetensorsReader(file).metadata["vitscale.dtype"] == dtype
    back = SavedModel(import_model(out, tmp_path / "back", format=format))
    for name, param in model.named_parameters():
        assert torch.equal(back.tensor(name), param.to(torch_dtype).float())


def test_a_shard_holds_at_most_the_limit_or_one_tensor(tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 3, "c": 1, "d": 6, "e": 1}  # in fp16: 4, 6, 2, 12 and 2 bytes
    tensors = {name: torch.full((size,), size / 4) for name, size in sizes.items()}
    shapes = {name: (size,) for name, size in sizes.items()}
    file = write_folder(tmp_path, tensors.items(), shapes, "fp16", {}, shard_bytes=10)
    index = json.loads((tmp_path / file).read_text())
    assert index["metadata"]["total_size"] == 26
    shards: dict[str, str] = {}
    for name, shard in index["weight_map"].items():
        shards[shard] = shards.get(shard, "") + name
    assert list(shards.values()) == ["ab", "c", "d", "e"]
    weights = Weights(tmp_path / file)
    assert all(torch.equal(weights.tensor(name), tensors[name]) for name in tensors)
    assert write_folder(tmp_path, tensors.items(), shapes, "fp16", {}, shard_bytes=26) == "model.safetensors"


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    config = ViTConfig(variant="Ti/16", depth=2, image_size=32, num_classes=3)
    first = saved_model(tmp_path / "a.safetensors", config, seed=1)
    second = saved_model(tmp_path / "b.safetensors", config, seed=2)
    out = tmp_path / "out"
    export_model(tmp_path / "a.safetensors", out, format="safetensors", shard_mb=1)
    read = SavedModel.tensor

    def interrupted(self: SavedModel, name: str) -> Tensor:
        if name == "norm.weight":
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(SavedModel, "tensor", interrupted)
    for target, format in ((out, "safetensors"), (tmp_path / "new", "timm"), (tmp_path / "new.npz", "npz")):
        with pytest.raises(KeyboardInterrupt):
            export_model(tmp_path / "b.safetensors", target, format=format)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "out"}
    assert same_weights(load_model(out), first)
    export_model(tmp_path / "b.safetensors", out, format="safetensors")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert same_weights(load_model(out), second)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "out"}


def test_an_export_is_replaced_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: Any) -> None:
    saved_model(tmp_path / "a.safetensors")
    for format in ("transformers", "timm"):
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)  # as on some network file systems
        export_model(tmp_path / "a.safetensors", tmp_path / "out", format=format)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "out"}


def test_what_is_not_an_export_is_never_replaced(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    (tmp_path / "theirs").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs" / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    np.savez(tmp_path / "theirs.npz", a=np.zeros(1))
    for out, format, reason in (
        ("hf", "transformers", "it also holds notes.txt; name a new folder"),
        ("theirs", "timm", "its weights are not an export of vitscale; name a new folder"),
        ("theirs.safetensors", "safetensors", "it is not an export of vitscale; name a new file"),
        ("theirs.npz", "npz", "it is not an export of vitscale; name a new file"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=f"{out} is not replaced: {reason}"):
            export_model(tmp_path / "ours.safetensors", tmp_path / out, format=format)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        (
            {"pool": "mean"},
            {"format": "transformers"},
            "model.pool 'mean' cannot be exported to transformers",
        ),
        ({"representation_size": 8}, {"format": "transformers"}, "model.representation_size 8 cannot be"),
        ({"representation_size": 8}, {"format": "timm"}, "no tanh layer before its head; use"),
        ({"norm_eps": 1e-5}, {"format": "timm"}, "model.norm_eps 1e-05 cannot be exported to timm"),
        ({"num_patch_outputs": 9}, {"format": "timm"}, "model.num_patch_outputs 9 cannot .* no mask token"),
        (
            {"num_patch_outputs": 9},
            {"format": "npz"},
            "model.num_patch_outputs 9 cannot .* fine-tuned from it",
        ),
        ({"pool": "map"}, {"format": "npz"}, "model.pool 'map' cannot .* original: .* --dialect big_vision"),
        ({}, {"format": "safetensors", "slot": "ema"}, "holds no average of the weights"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_writing(
    tmp_path: Path, keys: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, **keys))
    out = tmp_path / ("out.npz" if arguments["format"] == "npz" else "out")
    with pytest.raises(CheckpointError, match=message):
        export_model(tmp_path / "ours.safetensors", out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


@pytest.mark.parametrize(
    ("out", "arguments", "message"),
    [
        ("out.npz", {"format": "npz", "dtype": "bf16"}, "NumPy has no bfloat16"),
        ("out.npz", {"format": "npz", "shard_mb": 5}, "one file whose name ends in .npz, without --shard-mb"),
        ("out", {"format": "npz"}, "one file whose name ends in .npz, without --shard-mb"),
        ("out", {"format": "timm", "shard_mb": 5}, "timm reads one model.safetensors, no shards"),
        ("out.npz", {"format": "safetensors"}, "has the name of a .npz file, and this is safetensors"),
        ("out.pth", {}, "has the name of a .pth file, and this is safetensors; end it in .safetensors"),
        ("out.onnx", {"format": "safetensors"}, "has the name of a .onnx file, and this is safetensors"),
        ("out.safetensors", {"format": "timm"}, "must be a folder: timm reads config.json"),
        ("out.onnx", {"format": "timm"}, "must be a folder: timm reads config.json"),
        ("out.npz", {"format": "transformers"}, "must be a folder: transformers reads config.json"),
        (
            "out.safetensors",
            {"format": "safetensors", "shard_mb": 5},
            "is one file, which cannot hold shards",
        ),
        ("out", {"format": "safetensors", "shard_mb": -1}, "--shard-mb -1 must not be negative"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_writing(
    tmp_path: Path, out: str, arguments: dict[str, Any], message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors")
    with pytest.raises(ConfigError, match=message):
        export_model(tmp_path / "ours.safetensors", tmp_path / out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_an_export_has_the_format_that_its_name_says(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    for name, content in (("a.npz", b"PK"), ("b.safetensors", b""), ("c/model.safetensors", b"")):
        assert main(["export", str(tmp_path / "ours.safetensors"), str(tmp_path / name.split("/")[0])]) == 0
        assert (tmp_path / name).read_bytes().startswith(content)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("export ours.safetensors", "x.safetensors"),
        ("export ours.safetensors", "x.npz"),
        ("export --format timm ours.safetensors", "x"),
        ("import --format safetensors ours.safetensors", "x.safetensors"),
        ("average ours.safetensors ours.safetensors", "x.safetensors"),
        ("reshard --world 1 run", "x"),
    ],
)
def test_nothing_is_written_to_a_store_and_a_file_url_is_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, command: str, name: str
) -> None:
    saved_model(tmp_path / "ours.safetensors")
    write_step(tmp_path / "run", 12, state_of(12))
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), f"s3://bucket/{name}"]) == 2
    refusal = f"error: s3://bucket/{name} is in a store: write to a local folder, and upload it from there\n"
    assert capsys.readouterr().err.endswith(refusal)
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors", "run"}
    assert main([*command.split(), f"file://{tmp_path}/{name}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors", "run", name}


def test_a_value_beyond_fp16_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    path, out = tmp_path / "ours.safetensors", tmp_path / "out"
    metadata = SafetensorsReader(path).metadata
    largest = torch.finfo(torch.float16).max
    save_file(load_file(path) | {"head.bias": torch.tensor([1, 2, 3, 4, 1e6])}, path, metadata)
    with pytest.raises(CheckpointError, match=r"head.bias holds 1e\+06, which is too large for fp16; use"):
        export_model(path, out, format="timm", dtype="fp16")
    assert not out.exists()
    save_file(load_file(path) | {"head.bias": torch.tensor([1, 2, 3, 4, largest])}, path, metadata)
    assert load_file(export_model(path, out, format="timm", dtype="fp16") / "model.safetensors")


HEADS = ["model.num_heads=4"]  # which no file says where timm's config.json is missing or cut


def timm_tensors(tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of an export at tmp_path / "timm"."""
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ({"head_dist.bias": (5,)}, "", "head_dist.bias has no place in a ViT"),
        ({"dist_token": (1, 1, 32)}, "", "pos_embed is for 8 patches, which make no square"),
        ({"blocks.0.gamma_1": (32,)}, "", "blocks.0.gamma_1 is a layer scale"),
        ({"blocks.0.mlp.w12.weight": (9, 32)}, "", "mlp.w12.weight belongs to a gated MLP"),
        ({"blocks.1.attn.q_norm.weight": (8,)}, "", "q_norm.weight normalises queries and keys"),
        ({"fc_norm.weight": (32,)}, "norm.weight", "fc_norm.weight normalises after the pooling"),
        ({"norm_pre.weight": (32,)}, "", "norm_pre.weight normalises before the blocks"),
        ({"head.mlp.0.weight": (9, 32)}, "", "head.mlp.0.weight belongs to a projection head"),
        ({"blocks.7.norm1.weight": (32,)}, "", "blocks.7.norm1.weight has no place in a ViT of vitscale"),
        ({}, "blocks.1.attn.qkv.bias", r"there is no blocks.1.attn.qkv.bias, which is \(96,\) in a ViT"),
        ({}, "patch_embed.proj.bias", "there is no patch_embed.proj.bias"),
        (
            {"pos_embed": (1, 13, 32)},
            "",
            "pos_embed is for 12 patches, which make no square; add model.image_size=",
        ),
        (
            {"patch_embed.proj.weight": (32, 1, 4, 4)},
            "",
            "weight is for images of 1 channel, but .*; repeat it",
        ),
        ({"patch_embed.proj.weight": (32, 4, 4, 4)}, "", "weight is for images of 4 channels, but .* blue$"),
        ({"vision_model.post_layernorm.weight": (32,)}, "", "is of SigLIP or CLIP in transformers"),
        ({"patch_embed.proj.weight": (32, 3, 2, 8)}, "", r"patch_embed.proj.weight is \(32, 3, 2, 8\), but"),
        ({"pos_embed": (32,)}, "", "the shapes of its tensors are not those of a ViT"),
    ],
)
def test_other_architectures_are_refused_by_the_tensor(
    tmp_path: Path, added: dict[str, Any], removed: str, message: str
) -> None:
    tensors = timm_tensors(tmp_path)
    path, out = tmp_path / "x.safetensors", tmp_path / "out"
    others = {name: value for name, value in tensors.items() if name != removed}
    save_file(others | {name: torch.ones(shape) for name, shape in added.items()}, path)
    with pytest.raises(CheckpointError, match=f"x.safetensors: .*{message}"):
        import_model(path, out, format="timm", overrides=HEADS)
    assert not out.exists()
    save_file(tensors, path)
    assert import_model(path, out, format="timm", overrides=HEADS, pixels="half").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer 'quick_gelu'"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "act_layer 'quick_gelu'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer 'rmsnorm'"),
        ({"global_pool": "avg"}, "global_pool 'avg', but the tensors are those of 'token'"),
        ({"model_args": {"img_size": [4, 44]}}, r"has img_size \[4, 44\], but .* those of 12 x 12$"),
        ({"model_args": {"img_size": 16}}, "has img_size 16, but .* would be those of 12 x 12"),
        (
            {"pretrained_cfg": {"input_size": [3, 6, 24]}},  # no multiples of the patch size
            r"has input_size \[6, 24\], but .* those of 12 x 12$",
        ),
        ({"model_args": 3}, "is not a configuration in JSON"),
        ([], "is not a configuration in JSON"),
    ],
)
def test_other_architectures_are_refused_by_timms_config(tmp_path: Path, values: Any, message: str) -> None:
    timm_tensors(tmp_path)
    (tmp_path / "timm" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "timm", tmp_path / "out", format="timm", overrides=HEADS)
    ours = {
        "model_args": {"act_layer": "gelu_tanh", "norm_layer": None, "img_size": 12},
        "global_pool": "token",
        "pretrained_cfg": OUR_PIXELS | {"input_size": [3, 16, 16]},  # what it was trained at is no matter
    }
    (tmp_path / "timm" / "config.json").write_text(json.dumps(ours))
    assert import_model(tmp_path / "timm", tmp_path / "out", format="timm", overrides=HEADS).exists()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"model_type": "dinov3_vit"},
            CheckpointError,
            "model_type 'dinov3_vit'; only 'vit', 'deit' and DINOv2 can be imported$",
        ),
        (
            {"model_type": "beit"},
            CheckpointError,
            "only 'vit', 'deit' and DINOv2 can be imported .BEiT has relative positions",
        ),
        ({"model_type": "siglip_vision_model"}, CheckpointError, r"imported \(timm's vit_\*_siglip_\*"),
        ({"image_size": [4, 40]}, CheckpointError, r"image_size \[4, 40\], but .* those of 12 x 12$"),
        ({"image_size": 16}, CheckpointError, "image_size 16, but .* would be those of 12 x 12"),
        ({"hidden_act": "relu"}, CheckpointError, "hidden_act 'relu'"),
        ({"num_attention_heads": 5}, ConfigError, "model.num_heads 5"),
        ({"num_attention_heads": "four"}, ConfigError, "model.num_heads must be a whole number"),
    ],
)
def test_other_architectures_are_refused_by_transformers_config(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors")
    hf = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    ours = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(ours | values))
    with pytest.raises(error, match=message):
        import_model(hf, tmp_path / "out", format="transformers")
    (hf / "config.json").write_text(json.dumps(ours))
    assert import_model(hf, tmp_path / "out", format="transformers").exists()


def test_transformers_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    hf = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    (hf / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing beside the weights"):
        import_model(hf, tmp_path / "out", format="transformers")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv_root/kernel", "the shapes of its tensors are not those of a ViT or hybrid"),
        ("block1/unit1/conv1/kernel", "block1/unit1/conv1/kernel has no place in a ViT"),
        ("resnet/conv1/kernel", "belongs to another ResNet than a hybrid has"),
        ("Transformer/encoderblock_1/extra/scale", "encoderblock_1/extra/scale has no place"),
        ("Transformer/encoderblock_5/LayerNorm_0/scale", "encoderblock_5/LayerNorm_0/scale has no place"),
    ],
)
def test_unknown_npz_arrays_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    arrays = dict(np.load(out).items())
    np.savez(tmp_path / "x.npz", **arrays, **{name: np.ones(3, "f4")})
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "x.npz", tmp_path / "out", format="npz")
    np.savez(tmp_path / "x.npz", **arrays)
    assert import_model(tmp_path / "x.npz", tmp_path / "out", format="npz").exists()


def test_an_export_that_is_not_the_model_it_names_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "a.safetensors")
    tensors, metadata = (
        load_file(tmp_path / "a.safetensors"),
        SafetensorsReader(tmp_path / "a.safetensors").metadata,
    )
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match="does not hold the model that it names: norm"):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the model that it names: norm"):
        export_model(tmp_path / "b.safetensors", tmp_path / "out", format="timm")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"depth": 9_000_000}, r"it names: 9,000,000 blocks in 32 tensors"),
        ({"width": 10_000_000}, "it names: blocks.0.attn.proj.bias does not fit"),
        ({"width": 10**9}, r"model.width 1000000000 must lie in \[0, 16,777,216\]"),
        ({"posemb": "sincos2d", "image_size": 40_000}, "must be at most 65,536, and make at most 1,048,576"),
    ],
)
def test_what_hostile_metadata_name_is_never_built(
    tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    saved_model(tmp_path / "a.safetensors")
    metadata = SafetensorsReader(tmp_path / "a.safetensors").metadata
    metadata["vitscale.model"] = json.dumps({**json.loads(metadata["vitscale.model"]), **keys})
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises((CheckpointError, ConfigError)):
        import_model(tmp_path / "b.safetensors", tmp_path / "out", format="safetensors")
    assert not (tmp_path / "out").exists()
