"""Manifests: every version is read; a hostile one is refused before a file is opened."""

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import edit_manifest, state_of, write_step

import vitscale
from vitscale.checkpoint.manifest import (
    MANIFEST,
    Fragments,
    Manifest,
    TensorInfo,
    TrainState,
    joined,
    saved_config,
)
from vitscale.checkpoint.reshard import piece
from vitscale.checkpoint.verify import check_manifest
from vitscale.errors import CheckpointError
from vitscale.models.vit_config import ViTConfig
from vitscale.train import versions
from vitscale.weights.export import export_metadata


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["files"].update({"../x": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"..": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"a\0b": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"\ud800": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"x": {"num_bytes": 5, "checksum": 5}}),
        lambda v: v["files"].update({"x": {"num_bytes": -5, "checksum": ""}}),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[[0, 1, -1, 4]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[[0, 1, 0, -4]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[[0, 1, 0, 10**9]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[[0, 1, 0.0, 3]]),
        lambda v: v["tensors"]["norm.bias"].update(untrained=0),
        lambda v: v.update(slots=[5]),
        lambda v: v["train"]["versions"].update(vitscale=1),
    ],
)
def test_a_hostile_manifest_is_refused_before_any_file_is_opened(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    folder = write_step(tmp_path, 3, state_of(3))
    edit_manifest(folder / MANIFEST, edit)
    with pytest.raises(CheckpointError, match="was not written by vitscale"):
        Manifest.load(folder)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("step", "step_in_epoch", "steps_per_epoch"), [(23, 3, 10), (20, 0, 10), (7, 7, 0)])
def test_a_manifest_of_an_earlier_version_says_the_same(
    tmp_path: Path, version: int, step: int, step_in_epoch: int, steps_per_epoch: int
) -> None:
    folder = write_step(tmp_path, step, state_of(step))

    def downgrade(values: dict[str, Any]) -> None:
        train = values.pop("train")
        bad_samples = {} if version == 1 else {"bad_samples": 4}
        separate_fragments(values)
        tensors = {
            name: {k: info[k] for k in ("shape", "fragments")} for name, info in values["tensors"].items()
        }
        if version == 2:
            tensors["norm.bias"]["fixed"] = True
        values.update(
            {key: train[key] for key in ("step", "samples_seen", "precision", "config", "versions")},
            version=version,
            epoch=step // 10,
            step_in_epoch=step_in_epoch,
            data_fingerprint=f"{train['data_fingerprint']}-{train['decoder']}",
            counters={**values["counters"], **bad_samples},
            optimizer_steps=step,
            states=values.pop("slots"),
            tensors=tensors,
        )

    expected = Manifest.load(folder)
    edit_manifest(folder / MANIFEST, downgrade)
    manifest = Manifest.load(folder)
    train = dataclasses.replace(
        expected.train, steps_per_epoch=steps_per_epoch, bad_samples=4 if version == 2 else 0
    )
    assert manifest.train == train
    assert (manifest.train.epoch, manifest.train.step_in_epoch) == (step // 10, step_in_epoch)
    assert manifest.tensors["norm.bias"].untrained == (version == 2)
    assert (manifest.slots, manifest.counters, manifest.files) == (
        expected.slots,
        expected.counters,
        expected.files,
    )


def separate_fragments(values: dict[str, Any]) -> None:
    """The edit that makes a manifest of version 3: each fragment by itself, in any order."""
    files = sorted(values["files"])
    for info in values["tensors"].values():
        info["fragments"] = [
            [files[file + index], start + index * count, count]
            for file, num_files, start, count in reversed(info["fragments"])
            for index in range(num_files)
        ]
    values["version"] = 3


def test_a_manifest_of_version_3_says_the_same(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 3, state_of(3), world_size=7)
    expected = Manifest.load(folder)
    edit_manifest(folder / MANIFEST, separate_fragments)
    assert Manifest.load(folder) == expected


@pytest.mark.parametrize(
    ("fragment", "accepted"),
    [
        (["rank-00000.safetensors", 0, 3], True),
        (["rank-00000.safetensors", 0, 0], True),
        (["elsewhere", 0, 3], False),
        (["rank-00000.safetensors", -1, 3], False),
        (["rank-00000.safetensors", 0, -3], False),
        (["rank-00000.safetensors", 0, 10**9], False),
        (["rank-00000.safetensors", 0, 10**30], False),
        (["rank-00000.safetensors", 0.0, 3], False),
        (["rank-00000.safetensors", 0], False),
    ],
)
def test_a_hostile_manifest_of_version_3_is_refused_too(
    tmp_path: Path, fragment: list[Any], accepted: bool
) -> None:
    folder = write_step(tmp_path, 3, state_of(3))

    def edit(values: dict[str, Any]) -> None:
        separate_fragments(values)
        values["tensors"]["norm.bias"]["fragments"] = [fragment]

    edit_manifest(folder / MANIFEST, edit)
    if accepted:
        Manifest.load(folder)
    else:
        with pytest.raises(CheckpointError, match="was not written by vitscale"):
            Manifest.load(folder)


def pieces_of(manifest: Manifest, name: str) -> list[tuple[str, int, int]]:
    return list(manifest.overlapping(name, 0, 10**9))


def test_equal_fragments_in_consecutive_files_are_one_entry(tmp_path: Path) -> None:
    """77 values on 4 ranks are 3 x 20 and 17; 15 that are cut unevenly stay as they are."""
    pieces = np.array([[3, 60, 17], [0, 0, 20], [2, 40, 20], [1, 20, 20]])
    assert joined(pieces) == (Fragments(0, 3, 0, 20), Fragments(3, 1, 60, 17))
    uneven = np.array([[0, 0, 5], [2, 5, 5], [3, 10, 4], [4, 14, 1]])
    assert joined(uneven) == tuple(Fragments(file, 1, start, count) for file, start, count in uneven.tolist())
    manifest = Manifest.load(write_step(tmp_path, 3, state_of(3), world_size=4))
    info = TensorInfo(shape=(77,), fragments=joined(pieces))
    manifest = dataclasses.replace(manifest, tensors={"a": info})
    files = [f"rank-0000{rank}.safetensors" for rank in range(4)]
    assert pieces_of(manifest, "a") == [*zip(files, (0, 20, 40, 60), (20, 20, 20, 17), strict=True)]
    for start in range(77):
        for end in range(start + 1, 78):
            expected = [
                piece for piece in pieces_of(manifest, "a") if piece[1] < end and sum(piece[1:]) > start
            ]
            assert list(manifest.overlapping("a", start, end)) == expected


def test_a_manifest_does_not_grow_with_the_product_of_tensors_and_ranks(tmp_path: Path) -> None:
    """300 tensors on 300 ranks at ZeRO 3, each in its own number of fragments."""
    manifest = Manifest.load(write_step(tmp_path, 3, state_of(3)))
    files = {f"rank-{rank:05d}.safetensors": manifest.files["rank-00000.safetensors"] for rank in range(300)}
    cut = [[piece(size, rank, 300) for rank in range(300)] for size in range(1, 301)]
    tensors = {
        f"blocks.{size}": TensorInfo(
            shape=(size,),
            fragments=joined(np.array([[rank, *each] for rank, each in enumerate(pieces) if each[1]])),
        )
        for size, pieces in enumerate(cut, start=1)
    }
    large = dataclasses.replace(manifest, files=files, tensors=tensors)
    assert len(large.to_bytes()) < 75_000
    assert check_manifest(tmp_path, large) == ""


def test_the_epoch_follows_from_the_batches_consumed(tmp_path: Path) -> None:
    train = Manifest.load(write_step(tmp_path, 3, state_of(3))).train
    assert epoch_of(train, 25, 10) == (2, 5)
    assert epoch_of(train, 30, 10) == (3, 0)
    assert epoch_of(train, 7, 0) == (0, 7)


def epoch_of(train: TrainState, data_step: int, steps_per_epoch: int) -> tuple[int, int]:
    at = dataclasses.replace(train, data_step=data_step, steps_per_epoch=steps_per_epoch)
    return at.epoch, at.step_in_epoch


def test_the_version_that_is_written_down_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install keeps the version that it was made with."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"installed {name}")
    installed = {name: f"installed {name}" for name in ("torch", "deepspeed", "numpy")}
    assert inspect.unwrap(versions)() == {"vitscale": vitscale.__version__, **installed}
    assert export_metadata(ViTConfig(), 3, "fp32")["vitscale.version"] == vitscale.__version__
    with pytest.raises(CheckpointError, match=rf"this vitscale \({vitscale.__version__}; it was written by"):
        saved_config(ViTConfig, {"mood": 1}, "model", "here", "0.0.9")
