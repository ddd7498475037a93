"""Other libraries' files, opened: tensors under the names of a dialect (models/names.py), to be read one by
one.

Files of the same library wrap the same names in different ways; all of that ends here.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vitscale import storage
from vitscale.checkpoint.foreign.deduce import refuse_other_parts
from vitscale.checkpoint.foreign.npz import NpzReader
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.weights import Weights, export_at
from vitscale.config import ConfigError
from vitscale.models.names import Dialect, Shapes

logger = logging.getLogger(__name__)

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
# A tensor that every ViT of a dialect has, and what may stand before its name, the longest first.
_MARKS = {
    "safetensors": "patch_embed.proj.weight",
    "timm": "patch_embed.proj.weight",
    "transformers": "embeddings.patch_embeddings.projection.weight",
    "npz": "embedding/kernel",
}
_PREFIXES = {
    "safetensors": ("module.", ""),
    "timm": ("module.backbone.", "backbone.", "module.", ""),  # DINO's, and DistributedDataParallel's
    "transformers": ("vit.", ""),  # ViTForImageClassification's, and ViTModel's own
    "npz": ("opt/target/img/", "params/img/", "img/", "opt/target/", "params/", ""),
}
_TABLES = ("model_args", "pretrained_cfg")  # in timm's config.json
_STACK = "Transformer/encoderblock/"  # big_vision under scan: one array for all blocks, [depth, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Tensors under a dialect's names. config_json: the file of that name beside them, empty if there is
    none. pixel_mean: what is subtracted from pixels in [0, 1], per channel, empty if no file says so.
    metadata: those of the file. read: by name, as fp32.
    """

    dialect: Dialect
    shapes: Shapes
    metadata: Mapping[str, str]
    config_json: Mapping[str, Any]
    pixel_mean: tuple[float, ...]
    read: Callable[[str], Tensor]


def open_safetensors(path: str, format: Literal["safetensors", "timm", "transformers"]) -> Source:
    """A safetensors file, the index of shards, or the folder of either. Raises CheckpointError or ConfigError
    for what is damaged, and for what has not the format's names.
    """
    place = _find_safetensors(path)
    weights = Weights(place)
    prefix = _prefix(path, format, weights.shapes)
    names = {_plain(name, format, prefix): name for name in weights.shapes}
    if len(names) < len(weights.shapes):
        raise ConfigError(
            f"{path}: some tensors are there with and without {prefix!r}; write one model to a file"
        )
    config_json = _read_json(storage.join(place, "config.json"))
    return Source(
        dialect="vitscale" if format == "safetensors" else format,
        shapes={name: weights.shapes[theirs] for name, theirs in names.items()},
        metadata=weights.metadata,
        config_json=config_json,
        pixel_mean=_pixel_mean(config_json, _read_json(storage.join(place, "preprocessor_config.json"))),
        read=lambda name: weights.tensor(names[name]),
    )


def open_npz(path: str) -> Source:
    """One of Google's .npz files, in any of their dialects, of the whole training state or of a model of
    images and texts. Raises as open_safetensors.
    """
    _refuse_pickle(path)
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not there; give the path of an .npz file on this machine")
    arrays = NpzReader(path)
    prefix = _prefix(path, "npz", arrays.shapes)
    outside = [name for name in arrays.shapes if not name.startswith(prefix)]
    if outside:
        logger.info("%d arrays outside %s are not of this model: %s, ...", len(outside), prefix, outside[0])
    inside = [name.removeprefix(prefix) for name in arrays.shapes if name.startswith(prefix)]
    dialect = _flax_dialect(inside)
    ours = "params/" if dialect == "big_vision" else ""
    places: dict[str, tuple[str, int | None]] = {}  # of each tensor: the array, and its row if it is stacked
    shapes: dict[str, tuple[int, ...]] = {}
    for name in inside:
        array, shape = prefix + name, arrays.shapes[prefix + name]
        if name.startswith(_STACK) and shape:
            for row in range(shape[0]):
                one = f"{ours}Transformer/encoderblock_{row}/{name.removeprefix(_STACK)}"
                places[one], shapes[one] = (array, row), shape[1:]
        else:
            places[ours + name], shapes[ours + name] = (array, None), shape

    def read(name: str) -> Tensor:
        array, row = places[name]
        return arrays.tensor(array) if row is None else arrays.row(array, row)

    return Source(
        dialect=dialect,
        shapes=shapes,
        metadata=arrays.metadata,
        config_json={},
        pixel_mean=(),
        read=read,
    )


def _find_safetensors(path: str) -> str:
    _refuse_pickle(path)
    place = export_at(path)
    if place:
        return place
    for name in storage.names_in(path) if storage.is_local(path) and Path(path).is_dir() else ():
        _refuse_pickle(storage.child(path, name))
    raise CheckpointError(
        f"{path} is neither a .safetensors file nor a folder with model.safetensors; check the path"
    )


def _refuse_pickle(path: str) -> None:
    if path.endswith(_PICKLES):
        raise CheckpointError(
            f"{path} is a pickle, whose loading can run any code, so vitscale never does; where you trust "
            "it, run safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors') "
            "and import that"
        )


def _prefix(path: str, format: str, names: Iterable[str]) -> str:
    """What stands before the dialect's names in this file."""
    names = set(names)
    for prefix in _PREFIXES[format]:
        if prefix + _MARKS[format] in names:
            return prefix
    try:
        refuse_other_parts(sorted(names))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    fitting = [other for other, mark in _MARKS.items() if any(name.endswith(mark) for name in names)]
    hint = f"use --format {fitting[-1]}" if fitting else "these are not the weights of a ViT"
    raise ConfigError(f"{path} holds no {_MARKS[format]}, which every ViT in {format} format has; {hint}")


def _plain(name: str, format: str, prefix: str) -> str:
    """A name in the file as the dialect has it."""
    if format == "transformers":
        return name if prefix or name.startswith("classifier.") else f"vit.{name}"
    return name.removeprefix(prefix)


def _flax_dialect(names: Iterable[str]) -> Literal["original", "linen", "big_vision"]:
    names = set(names)
    if "Transformer/posembed_input/pos_embedding" not in names:
        return "big_vision"
    return "original" if any("/MlpBlock_3/" in name for name in names) else "linen"


def _read_json(path: str) -> dict[str, Any]:
    """A configuration beside the weights; empty if there is none."""
    try:
        values = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(key) or {}, dict) for key in _TABLES):
        return values
    raise CheckpointError(f"{path} is not a configuration in JSON, or a damaged one; copy it again")


def _pixel_mean(config: Mapping[str, Any], processor: Mapping[str, Any]) -> tuple[float, ...]:
    """As timm's config.json and transformers' preprocessor_config.json say it."""
    mean = (config.get("pretrained_cfg") or {}).get("mean") or processor.get("image_mean")
    if not isinstance(mean, list) or not all(isinstance(value, int | float) for value in mean):
        return ()
    return tuple(map(float, mean))
