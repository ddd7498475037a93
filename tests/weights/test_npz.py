"""Google's .npz files, both ways."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import TINY, flax_logits, images, logits, resolved, same_weights, saved_model

from vitscale import load_model
from vitscale.errors import CheckpointError
from vitscale.weights.export import export_safetensors
from vitscale.weights.foreign.convert import export_model, import_model
from vitscale.weights.saved import SavedModel

UPSTREAM = dataclasses.replace(TINY, representation_size=24)


@pytest.mark.parametrize(
    ("dialect", "pool"),
    [(dialect, pool) for dialect in ("original", "linen", "big_vision") for pool in ("token", "mean")]
    + [("big_vision", "map")],
)
def test_npz_files_hold_googles_model_to_the_bit(tmp_path: Path, dialect: Any, pool: str) -> None:
    config = dataclasses.replace(UPSTREAM, pool=pool)
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz", dialect=dialect)
    with np.load(out, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    assert (flax_logits(arrays, images(config), pool) - logits(model, config)).abs().max() < 1e-5
    np.savez(tmp_path / "plain.npz", **{name: value.numpy() for name, value in arrays.items()})
    for file in (out, tmp_path / "plain.npz"):
        back = load_model(import_model(file, tmp_path / "back", format="npz"))
        assert resolved(back.config) == resolved(config)
        assert torch.equal(logits(back, config), logits(model, config))
        assert same_weights(back, model) or (dialect == "big_vision" and pool == "token")
    again = export_model(tmp_path / "back", tmp_path / "b.npz", format="npz", dialect=dialect)
    with np.load(again, allow_pickle=False) as file:
        assert set(file.files) == set(arrays)
        assert all(np.array_equal(file[name], arrays[name].numpy()) for name in file.files)


@pytest.mark.parametrize("dialect", ["original", "linen", "big_vision"])
def test_positions_of_another_shape_are_no_npz_file_of_googles(tmp_path: Path, dialect: Any) -> None:
    saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, image_size=(4, 16), pool="mean"))
    message = rf"model.image_size \[4, 16\] cannot be exported to {dialect}: Google's code takes positions"
    with pytest.raises(CheckpointError, match=message):
        export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz", dialect=dialect)
    assert not (tmp_path / "a.npz").exists()


def test_equal_weights_make_equal_npz_files(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    for name in ("a.npz", "b.npz"):
        export_model(tmp_path / "ours.safetensors", tmp_path / name, format="npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("prefix", ["params/", "opt/target/", "params/img/", ""])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wrapped_and_stacked_npz_files_are_read(tmp_path: Path, caplog: Any, prefix: str, save: Any) -> None:
    caplog.set_level("INFO")
    config = dataclasses.replace(TINY, pool="map")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz", dialect="big_vision")
    with np.load(out) as file:
        arrays = {name.removeprefix("params/"): file[name] for name in file.files}
    stacked = {}
    for name in list(arrays):
        if "encoderblock_0" in name:
            rows = [arrays.pop(name.replace("_0", f"_{i}", 1)) for i in range(2)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(rows)
    wrapped = {prefix + name: value for name, value in (arrays | stacked).items()}
    if prefix:
        wrapped["opt/state/step"] = np.array([3])
    if prefix == "params/img/":
        wrapped["params/txt/head/bias"] = np.zeros(2, np.float32)
    save(tmp_path / "stacked.npz", **wrapped)
    back = load_model(import_model(tmp_path / "stacked.npz", tmp_path / "back", format="npz"))
    assert same_weights(back, model) and resolved(back.config) == resolved(config)
    assert ("arrays outside" in caplog.text) == bool(prefix)


def test_npz_arrays_of_two_bytes_and_in_fortrans_order_are_read_exactly(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    export_model(tmp_path / "ours.safetensors", tmp_path / "half.npz", format="npz", dtype="fp16")
    bf16 = export_safetensors(tmp_path / "ours.safetensors", tmp_path / "bf16.safetensors", dtype="bf16")
    out = export_model(bf16, tmp_path / "a.npz", format="npz")
    with np.load(out) as file:
        arrays = {name: file[name] for name in file.files}
    upper = {
        name: (value.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, value in arrays.items()
    }
    np.savez(tmp_path / "v2.npz", **upper)
    np.savez(tmp_path / "fortran.npz", **{name: np.asfortranarray(value) for name, value in arrays.items()})
    expected = load_model(bf16)
    for name in ("v2.npz", "fortran.npz"):
        assert same_weights(
            load_model(import_model(tmp_path / name, tmp_path / "back", format="npz")), expected
        )
    half = SavedModel(import_model(tmp_path / "half.npz", tmp_path / "back", format="npz"))
    assert all(torch.equal(value, value.half().float()) for _, value in half.tensors())


def test_an_exact_gelu_is_reported_and_kept_in_npz(tmp_path: Path, caplog: Any) -> None:
    saved_model(tmp_path / "ours.safetensors", dataclasses.replace(TINY, gelu="exact"))
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    assert "this one has model.gelu = 'exact'" in caplog.text
    back = SavedModel(import_model(out, tmp_path / "back", format="npz"))
    assert back.config == SavedModel(tmp_path / "ours.safetensors").config and back.step == 7


@pytest.mark.parametrize("format", ["timm", "transformers", "npz"])
def test_fixed_positions_become_learned_ones(tmp_path: Path, format: Any) -> None:
    config = dataclasses.replace(TINY, posemb="sincos2d")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(
        tmp_path / "ours.safetensors",
        tmp_path / "a.npz" if format == "npz" else tmp_path / "a",
        format=format,
    )
    back = load_model(import_model(out, tmp_path / "back", format=format))
    assert back.config.posemb == "learned" and torch.equal(back.pos_embed, model.pos_embed)
    assert torch.equal(logits(back, config), logits(model, config))


def test_big_vision_computes_fixed_positions_itself(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, posemb="sincos2d", pool="mean")
    model = saved_model(tmp_path / "ours.safetensors", config)
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz", dialect="big_vision")
    with np.load(out) as file:
        assert not [name for name in file.files if "pos" in name]
        np.savez(tmp_path / "plain.npz", **{name: file[name] for name in file.files})
    path = import_model(
        tmp_path / "plain.npz", tmp_path / "back", format="npz", overrides=["model.image_size=12"]
    )
    assert torch.equal(logits(load_model(path), config), logits(model, config))
