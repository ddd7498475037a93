"""Manifests: every version is read; a hostile one is refused before a file is opened."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make import edit_manifest, state_of, write_step

from vitscale.checkpoint.manifest import MANIFEST, Manifest, TrainState
from vitscale.errors import CheckpointError


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["files"].update({"../x": v["files"]["rank-00000.safetensors"]}),
        lambda v: v["files"].update({"x": {"num_bytes": 5, "checksum": 5}}),
        lambda v: v["files"].update({"x": {"num_bytes": -5, "checksum": ""}}),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["rank-00000.safetensors", -1, 4]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["rank-00000.safetensors", 0, -4]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["rank-00000.safetensors", 0, 10**9]]),
        lambda v: v["tensors"]["norm.bias"].update(fragments=[["rank-00000.safetensors", 0.0, 16]]),
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


def test_the_epoch_follows_from_the_batches_consumed(tmp_path: Path) -> None:
    train = Manifest.load(write_step(tmp_path, 3, state_of(3))).train
    assert epoch_of(train, 25, 10) == (2, 5)
    assert epoch_of(train, 30, 10) == (3, 0)
    assert epoch_of(train, 7, 0) == (0, 7)


def epoch_of(train: TrainState, data_step: int, steps_per_epoch: int) -> tuple[int, int]:
    at = dataclasses.replace(train, data_step=data_step, steps_per_epoch=steps_per_epoch)
    return at.epoch, at.step_in_epoch
