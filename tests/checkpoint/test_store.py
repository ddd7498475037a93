"""Checkpoint files on disk: written exactly, verified by checksum, kept and found by number."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from vitscale import load_model
from vitscale.checkpoint import store
from vitscale.checkpoint.export import SavedModel, export_safetensors, locate
from vitscale.checkpoint.format import (
    CheckpointError,
    Manifest,
    SafetensorsReader,
    TensorInfo,
    write_safetensors,
)
from vitscale.checkpoint.load import FragmentReader
from vitscale.config import to_dict
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig

CONFIG = ModelConfig(variant="Ti/4", width=16, depth=1, num_heads=2, mlp_dim=24, image_size=8, num_classes=5)


def write_checkpoint(directory: Path, step: int, world_size: int = 3) -> dict[str, torch.Tensor]:
    """A committed checkpoint of a model whose tensors are cut at odd places among `world_size` files."""
    model = build_model(CONFIG, seed=step)
    state = {name: param.detach() for name, param in model.named_parameters()}
    folder = store.step_directory(directory, step)
    folder.mkdir(parents=True)
    files, tensors = (
        {},
        {name: TensorInfo(shape=tuple(value.shape), fragments=()) for name, value in state.items()},
    )
    for rank in range(world_size):
        file, pieces = f"rank-{rank:05d}.safetensors", {}
        for name, value in state.items():
            each = -(-value.numel() // world_size)
            start, count = rank * each, max(0, min(each, value.numel() - rank * each))
            if count:
                pieces[f"fp32/{name}"] = value.reshape(-1)[start : start + count]
                tensors[name] = dataclasses.replace(
                    tensors[name], fragments=(*tensors[name].fragments, (file, start, count))
                )
        files[file] = write_safetensors(folder / file, pieces, {"format": "pt"})
    manifest = Manifest(
        step=step,
        samples_seen=step * 8,
        epoch=0,
        step_in_epoch=step,
        data_fingerprint="f",
        optimizer="adamw",
        optimizer_steps=0,
        states=("fp32",),
        world_size=world_size,
        zero_stage=3,
        precision="fp32",
        loss_scaler={},
        counters={},
        config={"model": to_dict(CONFIG)},
        versions={},
        created="now",
        tensors=tensors,
        files=files,
    )
    manifest.save(folder / "manifest.json")
    return state


def test_our_safetensors_files_are_everyones(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.bfloat16), "none": torch.empty(0)}
    info = write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "note": "é"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
        for name, value in tensors.items()
    )
    assert info.num_bytes == (tmp_path / "x.safetensors").stat().st_size


def test_any_range_is_read_from_any_fragments(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path, 1, world_size=4)
    reader = FragmentReader(*store.newest_good(tmp_path))
    name = "blocks.0.mlp.fc1.weight"
    flat = state[name].reshape(-1)
    for start, count in ((0, 1), (95, 3), (0, flat.numel()), (flat.numel() - 1, 1), (37, 200)):
        destination = torch.full((count,), torch.nan)
        reader.read_into(destination, "fp32", name, start)
        assert torch.equal(destination, flat[start : start + count])
    assert torch.equal(reader.whole(name), state[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: f.write_bytes(f.read_bytes()[:-3] + b"\x01" + f.read_bytes()[-2:]),
            "is damaged: its checksum",
        ),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, damage, message: str, caplog
) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    damage(store.step_directory(tmp_path, 2) / "rank-00001.safetensors")
    path, manifest = store.newest_good(tmp_path)
    assert manifest.step == 1 and path == store.step_directory(tmp_path, 1)
    assert "step-000000002/rank-00001.safetensors" in caplog.text and message in caplog.text


def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    path = store.step_directory(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    for position in range(0, len(data), 61):
        flipped = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="manifest"):
            store.verify(path.parent)


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["files"].update({"../x.safetensors": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"/x.safetensors": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["elsewhere", 0, 16]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["rank-00000.safetensors", 0, 20]] * 2),
        lambda v: v["tensors"]["norm.bias"].update(
            fragments=[["rank-00000.safetensors", 0, 20], ["rank-00000.safetensors", 20, -4]]
        ),
        lambda v: v["tensors"]["norm.bias"].update(shape=[-4, -4]),
        lambda v: v["tensors"]["norm.bias"].update(
            shape=[10**15], fragments=[["rank-00000.safetensors", 0, 10**15]]
        ),
        lambda v: v["tensors"]["norm.bias"].update(shape=[16.0]),
        lambda v: v.update(tensors=[]),
        lambda v: v.update(files={"rank-00000.safetensors": 5}),
        lambda v: v.update(config=[]),
        lambda v: v.update(step="3"),
        lambda v: v.update(created=5),
        lambda v: v.update(evil=1),
        lambda v: v.pop("step"),
        lambda v: v.pop("version"),
    ],
)
def test_a_hostile_manifest_with_a_right_checksum_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    write_checkpoint(tmp_path, 3)
    path = store.step_directory(tmp_path, 3) / "manifest.json"
    values = json.loads(path.read_text())
    values.pop("checksum")
    edit(values)
    text = json.dumps(values, sort_keys=True).encode()
    path.write_text(json.dumps({**values, "checksum": xxhash.xxh3_128(text).hexdigest()}))
    with pytest.raises(CheckpointError):
        store.newest_good(tmp_path)


def test_with_no_good_checkpoint_left_the_run_is_not_called_new(tmp_path: Path) -> None:
    assert store.newest_good(tmp_path) is None
    write_checkpoint(tmp_path, 1)
    (store.step_directory(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies \(.*holds no manifest.json"):
        store.newest_good(tmp_path)


def test_steps_are_ordered_by_number_and_leftovers_are_no_checkpoints(tmp_path: Path) -> None:
    for step in (900_000_000, 2_000_000_000, 5):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".tmp-step-000000007").mkdir()
    (tmp_path / "step-old").mkdir()
    assert store.steps_on_disk(tmp_path) == [5, 900_000_000, 2_000_000_000]


def test_only_our_own_names_are_steps(tmp_path: Path) -> None:
    for name in ("step-²", "step-5", "step-000000004-copy", "step-٠٠٠٠٠٠٠٠٣", "step-000000002"):
        (tmp_path / name).mkdir()
    assert store.steps_on_disk(tmp_path) == [2]


@pytest.mark.parametrize(
    ("steps", "keep_last", "every", "kept"),
    [
        ([10, 20, 30, 40], 2, 0, {30, 40}),
        ([10, 20, 30, 40], 1, 20, {20, 40}),
        ([10], 3, 0, {10}),
        ([5, 10, 15, 20, 25], 1, 10, {10, 20, 25}),
    ],
)
def test_retention_keeps_the_last_and_every_nth(
    steps: list[int], keep_last: int, every: int, kept: set[int]
) -> None:
    assert store.retained(steps, keep_last, every) == kept


def test_an_export_gives_the_same_model_without_deepspeed(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "run" / "checkpoints", 3)
    for out in ("one.safetensors", "folder"):
        path = export_safetensors(tmp_path / "run", tmp_path / out)
        assert locate(path) == (str(path), 3)
        for source in (
            tmp_path / "run",
            store.step_directory(tmp_path / "run" / "checkpoints", 3),
            tmp_path / out,
        ):
            model = load_model(source)
            assert model.config == CONFIG and not model.training
            assert all(torch.equal(param, state[name]) for name, param in model.named_parameters())
    assert set(load_file(tmp_path / "one.safetensors")) == set(state)
    assert SafetensorsReader(tmp_path / "one.safetensors").metadata["vitscale.step"] == "3"


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint: give a run directory"):
        SavedModel(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"hello, this is text")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SavedModel(tmp_path / "x.safetensors")
    write_safetensors(tmp_path / "y.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="was not exported by vitscale"):
        SavedModel(tmp_path / "y.safetensors")
