"""The mean of several checkpoints' weights, as one export: the last ones of a run, or fine-tunings of one
model.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitscale import config as configs
from vitscale.checkpoint.export import SavedModel, State, export_metadata, write_export
from vitscale.checkpoint.format import CheckpointError
from vitscale.models.vit import ModelConfig

_TRAINING_KEYS = ("head_bias", "dropout")  # of [model], but nothing that the weights compute depends on them


def average(paths: Sequence[str | Path], out: str | Path, *, state: State = "fp32") -> Path:
    """Write the mean of checkpoints' weights, taken in float64, as an fp32 export. One tensor of the mean and
    one of a source are in memory at a time.

    paths, state: as SavedModel; out: as write_export. The export has the step of the latest source, and the
    steps of all in its metadata. Raises CheckpointError for fewer than two, for two different models, and for
    an `out` that exists.
    """
    if len(paths) < 2:
        raise CheckpointError(f"average needs two checkpoints or more before OUT, not {len(paths)}")
    if Path(out).exists():
        raise CheckpointError(
            f"{out} exists, and average overwrites nothing: is OUT missing at the end? else delete it first"
        )
    sources = [SavedModel(path, state=state) for path in paths]
    first = sources[0]
    for other in sources[1:]:
        _check_same_model(first, other)
    metadata = export_metadata(first.config, max(source.step for source in sources), "fp32") | {
        "vitscale.state": state,
        "vitscale.averaged_steps": json.dumps([source.step for source in sources]),
    }
    means = ((name, _mean(sources, name)) for name in first.shapes)
    return write_export(Path(out), means, first.shapes, metadata)


def _mean(sources: Sequence[SavedModel], name: str) -> Tensor:
    total = torch.zeros(sources[0].shapes[name], dtype=torch.float64)
    for source in sources:
        # In blocks, because torch casts a whole operand to add it.
        for sums, values in zip(_blocks(total), _blocks(source.tensor(name)), strict=True):
            sums += values
    return total.div_(len(sources)).to(torch.float32)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(1 << 20)


def _check_same_model(a: SavedModel, b: SavedModel) -> None:
    here, there = (configs.to_dict(_spelled_out(saved.config)) for saved in (a, b))
    for key in configs.differing_keys(here, there):
        if key not in _TRAINING_KEYS:
            raise CheckpointError(
                f"{b.path} is another model than {a.path}: model.{key} is {there[key]!r}, not {here[key]!r}; "
                "average checkpoints of one model"
            )
    if a.shapes != b.shapes:
        raise CheckpointError(f"{b.path} has other tensors than {a.path}; average checkpoints of one model")


def _spelled_out(config: ModelConfig) -> ModelConfig:
    """The same model with its sizes as numbers, however its config names them."""
    keys = ("width", "depth", "num_heads", "mlp_dim", "patch_size")
    sizes = {key: getattr(config, f"resolved_{key}") for key in keys}
    return dataclasses.replace(config, variant="B/16", **sizes)
