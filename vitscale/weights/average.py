"""Averages the weights of checkpoints: the last ones of a run, or several fine-tunings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale import config as configs
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import ModelConfig
from vitscale.models.transfer import backbone_of
from vitscale.stores import storage
from vitscale.weights.export import export_metadata, write_export
from vitscale.weights.files import TensorSource
from vitscale.weights.saved import SavedModel, Slot

_OF_INPUTS_AND_HEADS = ("image_size", "num_classes", "representation_size", "num_patch_outputs")


def average(paths: Sequence[str | Path], out: str | Path, *, slot: Slot = "fp32") -> Path:
    """Write the mean of several checkpoints' weights, computed in float64, as an fp32 export.

    paths, slot: as in SavedModel. out: as in write_export. The export has the step of the
    latest checkpoint, and the steps of all in its metadata. Two tensors are in memory at a
    time: the mean and one source. Raises ConfigError for fewer than two paths, and
    CheckpointError for different models and for an `out` that exists.
    """
    if len(paths) < 2:
        raise ConfigError(f"average needs two checkpoints or more before OUT, not {len(paths)}")
    out = storage.local_output(out)
    if out.exists():
        raise CheckpointError(
            f"{out} exists, and average overwrites nothing; name OUT at the end, or delete it first"
        )
    sources = [SavedModel(path, slot=slot) for path in paths]
    first = sources[0]
    for other in sources[1:]:
        _check_same_model(first, other)
    metadata = export_metadata(first.config, max(source.step for source in sources), "fp32") | {
        "vitscale.state": slot,
        "vitscale.averaged_steps": json.dumps([source.step for source in sources]),
    }
    means = ((name, _mean(sources, name)) for name in first.shapes)
    return write_export(out, means, first.shapes, metadata)


def _mean(sources: Sequence[TensorSource], name: str) -> Tensor:
    total = torch.zeros(sources[0].shapes[name], dtype=torch.float64)
    for source in sources:
        # In blocks: adding fp32 to float64, torch would first cast the whole tensor.
        for sums, values in zip(_blocks(total), _blocks(source.tensor(name)), strict=True):
            sums += values
    return total.div_(len(sources)).to(torch.float32)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(1 << 20)


def _check_same_model(a: SavedModel, b: SavedModel) -> None:
    model_a, model_b = compared_keys(a.config), compared_keys(b.config)
    for key, ours in model_a.items():  # the kind first, which says what other keys there are
        if (theirs := model_b.get(key)) != ours:
            raise CheckpointError(
                f"{b.path} is a different model from {a.path}: model.{key} is {theirs!r}, not {ours!r}; "
                "average checkpoints of one model"
            )
    if a.shapes != b.shapes:
        raise CheckpointError(
            f"{b.path} and {a.path} hold different tensors; average checkpoints of one model"
        )


def compared_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of [model] that decide what the weights compute, in which models must agree."""
    values = configs.to_dict(config)
    return backbone_of(config) | {key: values[key] for key in _OF_INPUTS_AND_HEADS if key in values}
