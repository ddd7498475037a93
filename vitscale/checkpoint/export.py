"""Checkpoints as plain models: weights in safetensors that carry their model's configuration, and the
nn.Module from it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from vitscale import config as configs
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.publish import publishing
from vitscale.checkpoint.verify import open_directory
from vitscale.checkpoint.weights import (
    Dtype,
    NamedTensors,
    Shapes,
    Weights,
    export_at,
    write_file,
    write_folder,
)
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig, ViT

State = Literal["fp32", "ema"]


class SavedModel:
    """Weights and configuration of a model on disk or in a store: a run directory (its newest good
    checkpoint), a step directory, or an export (the file, the index of its shards, or their folder).

    state: "ema" = the average of the weights over training, where a checkpoint has one. Raises
    CheckpointError for anything else, and for what is damaged.
    """

    def __init__(self, path: str | Path, *, state: State = "fp32") -> None:
        self._state: State = state
        self._source: FragmentReader | Weights
        export = export_at(str(path))
        if export:
            self.path = export
            self._source = Weights(export)
            self.step, self.shapes, model = _read_metadata(self._source)
        else:
            self.path, manifest = open_directory(str(path))
            self._source = FragmentReader(self.path, manifest)
            self.step = manifest.step
            self.shapes = {name: info.shape for name, info in manifest.tensors.items()}
            model = manifest.config.get("model")
        if state == "ema" and (export or "ema" not in manifest.states):
            raise CheckpointError(
                f"{self.path} has no average of the weights (EMA), but one set of them; leave --ema out, or "
                "train with optim.ema_decay"
            )
        if not isinstance(model, dict):
            raise CheckpointError(f"{self.path} names no model configuration: vitscale did not write it")
        self.config = configs.from_dict(ModelConfig, model, "model")

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, fp32."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path} holds no {name}, which the model that it names has")
        if isinstance(self._source, Weights):
            return self._source.tensor(name)
        return self._source.whole(name, self._state)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, read one by one, fp32."""
        return ((name, self.tensor(name)) for name in self.shapes)

    def state(self) -> dict[str, Tensor]:
        """All tensors by parameter name, fp32."""
        return dict(self.tensors())


def load_model(path: str | Path, *, state: State = "fp32") -> ViT:
    """The model of a checkpoint or export as a plain nn.Module in eval mode, fp32 on the CPU; DeepSpeed is
    not needed.

    state: as SavedModel. Raises CheckpointError if `path` is not a checkpoint or is damaged.
    """
    saved = SavedModel(path, state=state)
    model = build_model(saved.config, seed=0)
    held = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if held != dict(saved.shapes):
        names = sorted(name for name in {*held, *saved.shapes} if held.get(name) != saved.shapes.get(name))
        raise CheckpointError(f"{saved.path} does not hold the model that it names: {names[0]} does not fit")
    model.load_state_dict(saved.state(), strict=True)
    return model.eval()


def locate(path: str | Path, state: State = "fp32") -> tuple[str, int]:
    """The step directory or export that `path` means now, and its step: a live run's newest one changes."""
    saved = SavedModel(path, state=state)
    return saved.path, saved.step


def export_safetensors(
    path: str | Path, out: str | Path, *, dtype: Dtype = "fp32", shard_bytes: int = 0, state: State = "fp32"
) -> Path:
    """Write a checkpoint's weights to safetensors, tensor by tensor (memory: the largest tensor).

    out, shard_bytes: as write_export. state: as SavedModel. The export's metadata hold the model section of
    the config and the step, so that load_model needs nothing else. Returns the file's path.
    """
    saved = SavedModel(path, state=state)
    metadata = export_metadata(saved.config, saved.step, dtype) | {"vitscale.state": state}
    return write_export(Path(out), saved.tensors(), saved.shapes, metadata, dtype, shard_bytes)


def export_metadata(config: ModelConfig, step: int, dtype: Dtype) -> dict[str, str]:
    """What makes a file of weights an export."""
    return {
        "format": "pt",
        "vitscale.model": json.dumps(configs.to_dict(config)),
        "vitscale.step": str(step),
        "vitscale.dtype": dtype,
    }


def write_export(
    out: Path,
    tensors: NamedTensors,
    shapes: Shapes,
    metadata: Mapping[str, str],
    dtype: Dtype = "fp32",
    shard_bytes: int = 0,
) -> Path:
    """Write an export at once, tensor by tensor in the order of `shapes`.

    out: a file name ending in .safetensors, or a folder that gets model.safetensors, or shards of at most
    `shard_bytes`. Returns the path of the file or index. Raises CheckpointError if `out` is there and is not
    an export.
    """
    if out.suffix != ".safetensors":
        with publishing(out) as temporary:
            temporary.mkdir()
            name = write_folder(temporary, tensors, shapes, dtype, metadata, shard_bytes)
        return out / name
    if shard_bytes:
        raise CheckpointError(
            f"{out} is one file, which cannot hold shards; give a folder, or leave --shard-mb"
        )
    with publishing(out) as temporary:
        write_file(temporary, tensors, shapes, dtype, metadata)
    return out


def _read_metadata(weights: Weights) -> tuple[int, dict[str, tuple[int, ...]], object]:
    """Step, shapes and the plain values of the model's configuration."""
    try:
        model = json.loads(weights.metadata["vitscale.model"])
        step = int(weights.metadata["vitscale.step"])
    except KeyError:
        raise CheckpointError(
            f"{weights.path} was not exported by vitscale: it names no model configuration; "
            "tools/checkpoint.py import makes an export of other libraries' weights"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{weights.path} has damaged metadata; copy it again") from None
    return step, weights.shapes, model
