"""Checkpoints as plain models: one safetensors file that carries its model's configuration, and the nn.Module
from it.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from vitscale import config as configs
from vitscale import storage
from vitscale.checkpoint import store
from vitscale.checkpoint.format import CheckpointError, Manifest, SafetensorsReader, SafetensorsWriter
from vitscale.checkpoint.load import FragmentReader
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig, ViT

EXPORT_NAME = "model.safetensors"


class SavedModel:
    """Weights and configuration of a model on disk: a run directory (its newest good checkpoint), a step
    directory, or an export (the file, or the folder that holds it). Raises CheckpointError for anything else,
    and for what is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _locate(Path(path))
        self._fragments: FragmentReader | None = None
        if self.path.is_dir():
            manifest = store.verify(self.path)
            self._fragments = FragmentReader(self.path, manifest)
            self.step = manifest.step
            self.shapes = {name: info.shape for name, info in manifest.tensors.items()}
            model = manifest.config["model"]
        else:
            self._file, self.step, self.shapes, model = _open_export(self.path)
        self.config = configs.from_dict(ModelConfig, model, "model")

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, fp32."""
        if self._fragments:
            return self._fragments.whole(name)
        shape = self.shapes[name]
        flat = torch.empty(store.numel(shape))
        self._file.read_into(flat, name, 0)
        return flat.view(shape)

    def state(self) -> dict[str, Tensor]:
        """All tensors by parameter name, fp32."""
        return {name: self.tensor(name) for name in self.shapes}


def load_model(path: str | Path) -> ViT:
    """The model of a checkpoint or export as a plain nn.Module in eval mode, fp32 on the CPU; DeepSpeed is
    not needed.

    Raises CheckpointError if `path` is not a checkpoint or is damaged.
    """
    saved = SavedModel(path)
    model = build_model(saved.config, seed=0)
    model.load_state_dict(saved.state(), strict=True)
    return model.eval()


def checkpoint_step(path: str | Path) -> int:
    """The step at which a checkpoint or export was made."""
    return SavedModel(path).step


def export_safetensors(path: str | Path, out: str | Path) -> Path:
    """Write a checkpoint's fp32 weights to one safetensors file, tensor by tensor (memory: the largest
    tensor).

    out: a file name ending in .safetensors, or a folder that gets model.safetensors. The file's metadata
    holds the model section of the config and the step, so that load_model needs nothing else. Returns the
    file's path.
    """
    saved, target = SavedModel(path), Path(out)
    if target.suffix != ".safetensors":
        target = target / EXPORT_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "pt",
        "vitscale.model": json.dumps(configs.to_dict(saved.config)),
        "vitscale.step": str(saved.step),
    }
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shapes = {name: (shape, torch.float32) for name, shape in saved.shapes.items()}
    with SafetensorsWriter(temporary, shapes, metadata) as writer:
        for name in shapes:
            writer.write(name, saved.tensor(name))
    os.replace(temporary, target)
    storage.fsync_directory(target.parent)
    return target


def _locate(path: Path) -> Path:
    """The step directory or export file that a user's path means."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / EXPORT_NAME).is_file():
        return path / EXPORT_NAME
    if (path / "manifest.json").is_file():
        return path
    directory = path if path.name == "checkpoints" else store.directory_of(path)
    newest = store.newest_good(directory) if directory.is_dir() else None
    if newest:
        return newest[0]
    raise CheckpointError(
        f"{path} is not a checkpoint: give a run directory with checkpoints in it, a step directory, or an "
        "exported .safetensors file"
    )


def _open_export(path: Path) -> tuple[SafetensorsReader, int, dict[str, tuple[int, ...]], dict[str, object]]:
    try:
        file = SafetensorsReader(path)
        model = json.loads(file.metadata["vitscale.model"])
        step = int(file.metadata["vitscale.step"])
    except KeyError:
        raise CheckpointError(
            f"{path} was not exported by vitscale: it names no model configuration"
        ) from None
    except ValueError:
        raise CheckpointError(f"{path} is not a safetensors file, or a damaged one") from None
    return file, step, {name: tuple(entry["shape"]) for name, entry in file.header.items()}, model


def describe(path: str | Path) -> tuple[Path, Manifest]:
    """The step directory that `path` means, and its verified manifest. Raises for an export."""
    found = _locate(Path(path))
    if found.is_file():
        raise CheckpointError(f"{found} is an export: it holds weights only; give a run or step directory")
    return found, store.verify(found)
