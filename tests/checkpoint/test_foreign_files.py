"""Exported and imported files: rounded to nearest, there whole or not at all, refused by what is wrong."""

import dataclasses
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import TINY, same_weights, saved_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale import load_model
from vitscale.checkpoint import publish
from vitscale.checkpoint.export import SavedModel
from vitscale.checkpoint.foreign.convert import export_model, import_model
from vitscale.checkpoint.format import CheckpointError, SafetensorsReader
from vitscale.checkpoint.report.show import open_checkpoint
from vitscale.config import ConfigError
from vitscale.models.vit import ModelConfig


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("format", ["safetensors", "timm", "transformers"])
def test_16_bit_exports_round_to_nearest(tmp_path: Path, format: Any, dtype: Any) -> None:
    model = saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "out", format=format, dtype=dtype)
    file = tmp_path / "out" / "model.safetensors"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {value.dtype for value in load_file(file).values()} == {kind}
    assert SafetensorsReader(file).metadata["vitscale.dtype"] == dtype
    state = SavedModel(import_model(out, tmp_path / "back", format=format)).state()
    assert all(torch.equal(state[name], param.to(kind).float()) for name, param in model.named_parameters())


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    config = ModelConfig(variant="Ti/16", depth=2, image_size=32, num_classes=3)
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
        ("hf", "transformers", "notes.txt lies in it; name a new folder"),
        ("theirs", "timm", "its weights are not an export of vitscale; name a new folder"),
        ("theirs.safetensors", "safetensors", "it is not an export of vitscale; name a new file"),
        ("theirs.npz", "npz", "it is not an export of vitscale; name a new file"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=f"{out} is not replaced: {reason}"):
            export_model(tmp_path / "ours.safetensors", tmp_path / out, format=format)
        assert sorted(tmp_path.rglob("*")) == before


# refusals


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
        ({"pool": "map"}, {"format": "npz"}, "model.pool 'map' cannot .* original: .* --dialect big_vision"),
        ({}, {"format": "npz", "dtype": "bf16"}, "NumPy has no bfloat16"),
        ({}, {"format": "npz", "shard_mb": 5}, "one file whose name ends in .npz, without --shard-mb"),
        ({}, {"format": "timm", "shard_mb": 5}, "must be a folder; for timm with one model.safetensors"),
        ({}, {"format": "safetensors", "shard_mb": -1}, "--shard-mb -1 must not be negative"),
        ({}, {"format": "safetensors", "state": "ema"}, "has no average of the weights"),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_writing(
    tmp_path: Path, keys: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, **keys))
    out = tmp_path / ("out.npz" if arguments["format"] == "npz" else "out")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        export_model(tmp_path / "ours.safetensors", out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_a_value_beyond_fp16_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    state = load_file(tmp_path / "ours.safetensors")
    state["head.bias"][0] = 1e6
    save_file(state, tmp_path / "ours.safetensors", SafetensorsReader(tmp_path / "ours.safetensors").metadata)
    with pytest.raises(
        CheckpointError, match=r"head.bias holds 1e\+06, which is beyond fp16; use --dtype bf16"
    ):
        export_model(tmp_path / "ours.safetensors", tmp_path / "out", format="timm", dtype="fp16")
    assert not (tmp_path / "out").exists()


def timm_state(tmp_path: Path) -> dict[str, Tensor]:
    saved_model(tmp_path / "ours.safetensors")
    return load_file(
        export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm") / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ({"dist_token": (1, 1, 32)}, "", "dist_token belongs to DeiT's distillation token"),
        ({"reg_token": (1, 4, 32)}, "", "reg_token is of register tokens"),
        ({"blocks.0.ls1.gamma": (32,)}, "", "blocks.0.ls1.gamma is a layer scale"),
        ({"blocks.1.attn.q_norm.weight": (8,)}, "", "q_norm.weight normalises queries and keys"),
        ({"fc_norm.weight": (32,)}, "norm.weight", "fc_norm.weight normalises after the pooling"),
        ({"norm_pre.weight": (32,)}, "", "norm_pre.weight normalises before the blocks"),
        ({"head.mlp.0.weight": (9, 32)}, "", "head.mlp.0.weight is of a projection head"),
        ({"blocks.7.norm1.weight": (32,)}, "", "blocks.7.norm1.weight has no place in a ViT of vitscale"),
        (
            {},
            "blocks.1.attn.qkv.bias",
            r"there is no blocks.1.attn.qkv.bias, which a ViT of vitscale has \(96,\)",
        ),
        ({}, "patch_embed.proj.bias", "there is no patch_embed.proj.bias"),
        ({"pos_embed": (1, 13, 32)}, "", "pos_embed is for 12 patches, which are no square grid"),
        ({"patch_embed.proj.weight": (32, 1, 4, 4)}, "", r"patch_embed.proj.weight is \(32, 1, 4, 4\), but"),
        ({"patch_embed.proj.weight": (32, 3, 2, 8)}, "", r"patch_embed.proj.weight is \(32, 3, 2, 8\), but"),
        ({"pos_embed": (32,)}, "", "the shapes of its tensors are not those of a ViT"),
    ],
)
def test_other_architectures_are_refused_by_the_tensor(
    tmp_path: Path, added: dict[str, Any], removed: str, message: str
) -> None:
    state = timm_state(tmp_path)
    state.pop(removed, None)
    save_file(state | {name: torch.ones(shape) for name, shape in added.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=f"x.safetensors: .*{message}"):
        import_model(tmp_path / "x.safetensors", tmp_path / "out", format="timm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer 'quick_gelu'"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "act_layer 'quick_gelu'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer 'rmsnorm'"),
        ({"global_pool": "avg"}, "global_pool 'avg', but the tensors are those of 'token'"),
        ({"model_args": 3}, "is not a configuration in JSON"),
    ],
)
def test_other_architectures_are_refused_by_timms_config(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    timm_state(tmp_path)
    (tmp_path / "timm" / "config.json").write_text(json.dumps(values))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_model(tmp_path / "timm", tmp_path / "out", format="timm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_attention_heads": 5}, "model.num_heads 5"),
        ({"num_attention_heads": "four"}, "model.num_heads must be a whole number"),
        (None, "config.json is missing"),
    ],
)
def test_other_architectures_are_refused_by_transformers_config(
    tmp_path: Path, values: dict[str, Any] | None, message: str
) -> None:
    saved_model(tmp_path / "ours.safetensors")
    config = (
        export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers") / "config.json"
    )
    if values is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "hf", tmp_path / "out", format="transformers")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv_root/kernel", "conv_root/kernel is of a ResNet"),
        ("block1/unit1/conv1/kernel", "is of a ResNet"),
        ("Transformer/encoderblock_1/extra/scale", "encoderblock_1/extra/scale has no place"),
        ("Transformer/encoderblock_5/LayerNorm_0/scale", "encoderblock_5/LayerNorm_0/scale has no place"),
    ],
)
def test_unknown_npz_arrays_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    with np.load(out) as file:
        np.savez(tmp_path / "x.npz", **{key: file[key] for key in file.files}, **{name: np.ones(3, "f4")})
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "x.npz", tmp_path / "out", format="npz")


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    for name in ("deit.pth", "pytorch_model.bin", "x.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle, .*safetensors.torch.save_file"):
            import_model(tmp_path / name, tmp_path / "out", format="timm")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        import_model(tmp_path / "hub", tmp_path / "out", format="transformers")
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    with np.load(out) as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "x.npz", **arrays | {"head/bias": np.array([print] * 5, dtype=object)})
    with pytest.raises(CheckpointError, match="head/bias holds Python objects, whose loading can run code"):
        import_model(tmp_path / "x.npz", tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [60, 84]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000000], "data_offsets": [0, 4000000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 1%s], "data_offsets": [0, 0]}}' % (b"0" * 30),
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},'
        b' "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": ["x"], "a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}',
        b'{"__metadata__": {"vitscale.model": "[]", "vitscale.step": "3"}}',
        b"[" * 100_000,
        b'{"a": 5}',
        b"[1]",
    ],
)
def test_hostile_safetensors_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors"):
        SavedModel(path)
    if b"vitscale" not in header:  # a file without a model of ours may be shown
        with pytest.raises(CheckpointError, match=r"hostile\.safetensors"):
            open_checkpoint(str(path))


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    saved_model(tmp_path / "other.safetensors")
    (tmp_path / "out").mkdir()
    index = {"metadata": {}, "weight_map": {"norm.weight": "../other.safetensors"}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must name files beside it"):
        open_checkpoint(str(tmp_path / "out"))


def test_an_export_that_is_not_the_model_it_names_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "a.safetensors")
    tensors, metadata = (
        load_file(tmp_path / "a.safetensors"),
        SafetensorsReader(tmp_path / "a.safetensors").metadata,
    )
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match="does not hold the model that it names: norm"):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="holds no norm"):
        export_model(tmp_path / "b.safetensors", tmp_path / "out", format="timm")


@pytest.mark.parametrize(
    "damage", ["flipped", "encrypted", "huge", "rows", "scalar", "header", "name", "step"]
)
def test_hostile_archives_are_refused(tmp_path: Path, damage: str) -> None:
    saved_model(tmp_path / "good.safetensors")
    export_model(tmp_path / "good.safetensors", tmp_path / "good.npz", format="npz")
    path = tmp_path / "hostile.npz"
    np.savez_compressed(path, **dict(np.load(tmp_path / "good.npz").items()))
    data = bytearray(path.read_bytes())
    if damage == "flipped":  # in the compressed bytes of the first array
        data[200:240] = bytes(byte ^ 0xFF for byte in data[200:240])
    if damage == "encrypted":
        data[data.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    headers = {"huge": "(1000000000000,)", "rows": "(30000000, 0)", "scalar": "()"}
    with zipfile.ZipFile(path, "a") as archive:
        if damage in headers:
            text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {headers[damage]}}}".ljust(117) + "\n"
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(4)
            archive.writestr("Transformer/encoderblock/x.npy", header)
        if damage == "header":
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 4) + b"'''\n")
        if damage == "name":
            archive.writestr("x", b"")
        if damage == "step":
            archive.comment = b'{"vitscale.step": "x"}'
    with pytest.raises((CheckpointError, ConfigError), match="hostile"):
        import_model(path, tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()


def test_damaged_and_mistaken_files_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    npz = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    hf = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    (tmp_path / "cut.npz").write_bytes(data[:-500])
    np.savez(tmp_path / "bit.npz", **{"resnet/root_block/standardized_conv2d/kernel": np.ones(3)})
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ours.safetensors").read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    for file, format, message in (
        ("flipped.npz", "npz", "flipped.npz is damaged: .* cannot be read"),
        ("cut.npz", "npz", "cut.npz is not an .npz file of arrays, or a damaged one"),
        ("bit.npz", "npz", "bit.npz: resnet/root_block/standardized_conv2d/kernel is of a ResNet"),
        ("none.npz", "npz", "none.npz is not there"),
        ("x.safetensors", "timm", "holds no patch_embed.proj.weight.* these are not the weights of a ViT"),
        ("cut.safetensors", "safetensors", "ends inside"),
        (hf, "timm", "use --format transformers"),
        (tmp_path / "ours.safetensors", "transformers", "use --format timm"),
        ("empty", "timm", "is neither a .safetensors file nor a folder with model.safetensors"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            import_model(tmp_path / file, tmp_path / "out", format=format)
    with pytest.raises(CheckpointError, match=r"hf/model.safetensors was not exported by vitscale.*import"):
        SavedModel(hf)
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(CheckpointError, match=r"must name files beside it, not '\.\./b'"):
        import_model(hf, tmp_path / "out", format="transformers")
