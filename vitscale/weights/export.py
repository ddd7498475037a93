"""Exports: a model as a file of weights that carries its own configuration."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vitscale import __version__
from vitscale import config as configs
from vitscale.errors import ConfigError
from vitscale.models.model import CommonConfig, Model
from vitscale.models.names import our_shapes
from vitscale.stores import storage
from vitscale.weights.files import Dtype, NamedTensors, Shapes, write_file, write_folder
from vitscale.weights.publish import publishing
from vitscale.weights.saved import SavedModel, Slot

OTHER_FILES = (".npz", ".npy", ".onnx", ".pth", ".pt", ".bin", ".ckpt", ".pkl")


def export_safetensors(
    path: str | Path, out: str | Path, *, dtype: Dtype = "fp32", shard_bytes: int = 0, slot: Slot = "fp32"
) -> Path:
    """Write a checkpoint's weights to safetensors and return the path of the file or index.

    path, slot: as in SavedModel. out, shard_bytes: as in write_export. The metadata hold the
    step and [model], so load_model needs nothing else. One tensor is in memory at a time.
    """
    out = storage.local_output(out)
    saved = SavedModel(path, slot=slot)
    metadata = export_metadata(saved.config, saved.step, dtype) | {"vitscale.state": slot}
    return write_export(out, saved.tensors(), saved.shapes, metadata, dtype, shard_bytes)


def save_model(model: nn.Module, out: str | Path, *, dtype: Dtype = "fp32", step: int = 0) -> Path:
    """Write a model, wherever it was trained, as an export; returns the path of the file.

    load_model, [init] and every command read it. out: as in write_export. step: of its
    training, if it has one. Raises as write_export, TypeError for another module, and
    ConfigError for parameters that are not those of model.config, such as a replaced head.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"save_model takes a model of vitscale, not {type(model).__name__}; of a wrapper, pass the model "
            "in it: .module of DistributedDataParallel, ._orig_mod of torch.compile"
        )
    params = dict(model.named_parameters())
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    _check_shapes(shapes, our_shapes(model.config))
    tensors = ((name, param.detach().float().cpu()) for name, param in params.items())
    return write_export(
        storage.local_output(out), tensors, shapes, export_metadata(model.config, step, dtype), dtype
    )


def _check_shapes(shapes: Shapes, expected: Shapes) -> None:
    """Raise ConfigError for the first parameter that is not as the model's config says."""
    for name in {**expected, **shapes}:
        shape, said = (of.get(name, "absent") for of in (shapes, expected))
        if shape != said:
            raise ConfigError(
                f"{name} is {shape} in the model, but {said} by model.config, so the export could not be "
                "loaded; for another head, take load_model(PATH, num_classes=N) and train that"
            )


def export_metadata(config: CommonConfig, step: int, dtype: Dtype) -> dict[str, str]:
    """The metadata that make a file of weights an export."""
    return {
        "format": "pt",
        "vitscale.model": json.dumps(configs.to_dict(config)),
        "vitscale.step": str(step),
        "vitscale.version": __version__,
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
    """Write an export, tensor by tensor, and return the path of the file or index.

    out: a file name ending in .safetensors, or a folder for model.safetensors or its shards.
    tensors: in the order of `shapes`. shard_bytes: as in write_folder; 0 for a file. Raises
    ConfigError for the name of another kind of file, and CheckpointError if `out` exists and is
    not an export.
    """
    if out.suffix in OTHER_FILES:
        raise ConfigError(
            f"{out} has the name of a {out.suffix} file, and this is safetensors; end it in .safetensors, or "
            "name a folder"
        )
    if out.suffix != ".safetensors":
        with publishing(out) as temporary:
            temporary.mkdir()
            name = write_folder(temporary, tensors, shapes, dtype, metadata, shard_bytes)
        return out / name
    if shard_bytes:
        raise ConfigError(f"{out} is one file, which cannot hold shards; give a folder, or drop --shard-mb")
    with publishing(out) as temporary:
        write_file(temporary, iter(tensors), shapes, dtype, metadata)
    return out
