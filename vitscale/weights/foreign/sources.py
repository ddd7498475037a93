"""Opens the files of other libraries: tensors under the names of a dialect (models/names.py).

In files, the same names have different prefixes, and tensors lie in shards or are stacked over
the blocks; a ForeignWeights hides that.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.models.names import BIT_ROOT, Dialect
from vitscale.stores import storage
from vitscale.weights.files import Shapes, Weights, find_export
from vitscale.weights.foreign.deduce import refuse_other_architectures
from vitscale.weights.foreign.pixels import Normalisation, stated
from vitscale.weights.npz import NpzReader

logger = logging.getLogger(__name__)

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
# A tensor that every ViT of a format has.
_LANDMARKS = {
    "safetensors": "patch_embed.proj.weight",
    "timm": "patch_embed.proj.weight",
    "transformers": "embeddings.patch_embeddings.projection.weight",
    "npz": "embedding/kernel",
}
# Of torch.compile, DistributedDataParallel, one in the other, and Lightning.
_WRAPPERS = ("module._orig_mod.", "_orig_mod.module.", "_orig_mod.", "module.", "model.")
# What may stand before its name, the longest first.
_PREFIXES = {
    "safetensors": (*_WRAPPERS, ""),
    "timm": ("module.backbone.", "backbone.", *_WRAPPERS, ""),  # the first two are DINO's
    "transformers": ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", ""),  # "": ViTModel's own
    "npz": ("opt/target/img/", "params/img/", "img/", "opt/target/", "params/", ""),
}
# transformers' heads, whose names have no prefix; a model with a distillation token has two.
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
# transformers' DINOv2 is its ViT under other names, by patterns.
_DINOV2_TYPES = ("dinov2", "dinov2_with_registers")
_DINOV2_NAMES = {
    r"(layer\.\d+\.)norm1\.": r"\1layernorm_before.",
    r"(layer\.\d+\.)norm2\.": r"\1layernorm_after.",
    r"(layer\.\d+\.)mlp\.fc1\.": r"\1intermediate.dense.",
    r"(layer\.\d+\.)mlp\.fc2\.": r"\1output.dense.",
}
# Why, or how else, by transformers' model_type.
_SIGLIP = " (timm's vit_*_siglip_* and Google's .npz are SigLIP in a form that can be)"
_OTHER_TYPES = {
    "beit": " (BEiT has relative positions and a layer scale)",
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
_TABLES = ("model_args", "pretrained_cfg")  # of timm's config.json
_BIT_NUMBER = re.compile(r"/(standardized_conv2d|group_norm|conv2d)_\d+/")
_GROUP_NORM = re.compile(r"/group_norm/|(^|/)gn(_root|_proj|\d)/(scale|bias)$")  # of BiT, of a hybrid
_STACKED = "Transformer/encoderblock/"  # big_vision with scan: all blocks in one array
_MAX_DEPTH = 1000  # of stacked blocks: each of them gets names of its own
Places = dict[str, tuple[str, int | None]]  # of each tensor its array, and its row in a stacked one


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """Another library's weights under the names of its dialect (a TensorSource).

    metadata: of the file. config_json: the file of that name beside it, empty if there is none.
    normalisation: of its pixels; None if no file says it.
    """

    dialect: Dialect
    shapes: Shapes
    metadata: Mapping[str, str]
    config_json: Mapping[str, Any]
    normalisation: Normalisation | None
    tensor: Callable[[str], Tensor]


def open_safetensors(path: str, format: Literal["safetensors", "timm", "transformers"]) -> ForeignWeights:
    """Open a safetensors file, the index of shards, or the folder of either.

    Raises CheckpointError for damaged files and for names that are not the format's.
    """
    place = _find_safetensors(path)
    weights = Weights(place)
    config_json = _read_json(storage.join(place, "config.json"))
    processor = _read_json(storage.join(place, "preprocessor_config.json"))
    _check_model_type(path, config_json)
    prefix = _find_prefix(path, format, weights.shapes)
    stored_names = {_dialect_name(name, format, prefix): name for name in weights.shapes}
    if len(stored_names) < len(weights.shapes):
        raise CheckpointError(
            f"{path}: some tensors are there with and without {prefix!r}; write one model to a file"
        )
    return ForeignWeights(
        dialect="vitscale" if format == "safetensors" else format,
        shapes={name: weights.shapes[stored] for name, stored in stored_names.items()},
        metadata=weights.metadata,
        config_json=config_json,
        normalisation=stated(path, format, config_json, processor),
        tensor=lambda name: weights.tensor(stored_names[name]),
    )


def open_npz(path: str) -> ForeignWeights:
    """Open one of Google's .npz files, in any dialect: a ViT, a hybrid, a BiT ResNet, a whole
    training state, or a model of images and texts. Raises as open_safetensors.

    In some files the norms of a hybrid or of BiT have shape [1, 1, 1, C].
    """
    _refuse_pickle(path)
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist; give the path of an .npz file on this machine")
    arrays = NpzReader(path)
    dialect, places = _bit_places(path, arrays.shapes) or _vit_places(path, arrays.shapes)
    shapes = {
        name: arrays.shapes[array] if row is None else arrays.shapes[array][1:]
        for name, (array, row) in places.items()
    }
    norms = [name for name, shape in shapes.items() if _GROUP_NORM.search(name) and shape[:-1] == (1, 1, 1)]
    shapes |= {name: shapes[name][-1:] for name in norms}

    def tensor(name: str) -> Tensor:
        array, row = places[name]
        value = arrays.tensor(array) if row is None else arrays.row(array, row)
        return value.reshape(shapes[name])

    return ForeignWeights(
        dialect=dialect,
        shapes=shapes,
        metadata=arrays.metadata,
        config_json={},
        normalisation=None,
        tensor=tensor,
    )


def _bit_places(path: str, shapes: Shapes) -> tuple[Dialect, Places] | None:
    """Of a BiT ResNet. Some of its files number layers, as in standardized_conv2d_17."""
    if not any(name.startswith("resnet/root_block/") for name in shapes):
        return None
    stored = [name for name in shapes if name.startswith("resnet/")]
    places: Places = {_BIT_NUMBER.sub(r"/\1/", name): (name, None) for name in stored}
    if len(places) < len(stored):
        raise CheckpointError(f"{path}: some layers are there under two numbers; write one model to a file")
    if BIT_ROOT not in places:
        raise CheckpointError(f"{path} holds no {BIT_ROOT}, which every BiT ResNet has")
    return "bit", places


def _vit_places(path: str, shapes: Shapes) -> tuple[Dialect, Places]:
    prefix = _find_prefix(path, "npz", shapes)
    others = [name for name in shapes if not name.startswith(prefix)]
    if others:
        logger.info("%d arrays outside %s are not of this model: %s, ...", len(others), prefix, others[0])
    dialect = _flax_dialect(name.removeprefix(prefix) for name in shapes if name.startswith(prefix))
    return dialect, _places(path, shapes, prefix, "params/" if dialect == "big_vision" else "")


def _places(path: str, shapes: Shapes, prefix: str, dialect_prefix: str) -> Places:
    """The array that holds each tensor of the dialect, and the tensor's row in a stacked one.

    The array opt/target/Transformer/encoderblock/LayerNorm_0/scale [depth, D] holds the tensors

        params/Transformer/encoderblock_0/LayerNorm_0/scale    in row 0
        params/Transformer/encoderblock_1/LayerNorm_0/scale    in row 1, and so on
    """
    places: Places = {}
    for array, shape in shapes.items():
        if not array.startswith(prefix):
            continue
        name = array.removeprefix(prefix)
        if name.startswith(_STACKED) and shape:
            if shape[0] > _MAX_DEPTH:
                raise CheckpointError(
                    f"{path}: {array} stacks {shape[0]:,} blocks; at most {_MAX_DEPTH:,} are read"
                )
            leaf = name.removeprefix(_STACKED)
            for row in range(shape[0]):
                places[f"{dialect_prefix}Transformer/encoderblock_{row}/{leaf}"] = (array, row)
        else:
            places[dialect_prefix + name] = (array, None)
    return places


def _find_safetensors(path: str) -> str:
    _refuse_pickle(path)
    place = find_export(path)
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
            f"{path} is a pickle, whose loading can run any code, so vitscale never loads one; if you trust "
            "it, run safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors') "
            "and import that; a training checkpoint holds the weights under a key, like ['state_dict'] "
            "(docs/checkpoints.md#pickles)"
        )


def _check_model_type(path: str, config_json: Mapping[str, Any]) -> None:
    """Raise CheckpointError for another model of transformers than its ViT."""
    model_type = config_json.get("model_type", "vit")  # timm's config.json has none
    if model_type not in ("vit", "deit", *_DINOV2_TYPES):
        hint = _OTHER_TYPES.get(str(model_type), "")
        raise CheckpointError(
            f"{path}: config.json has model_type {model_type!r}; only 'vit', 'deit' and DINOv2 can be "
            f"imported{hint}"
        )


def _find_prefix(path: str, format: str, names: Iterable[str]) -> str:
    """What stands before the dialect's names in this file."""
    names = set(names)
    for prefix in _PREFIXES[format]:
        if prefix + _LANDMARKS[format] in names:
            return prefix
    try:
        refuse_other_architectures(sorted(names))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    found = {
        other: name.removesuffix(mark)
        for other, mark in _LANDMARKS.items()
        for name in sorted(names)
        if name.endswith(mark)
    }
    hint = "these are not the weights of a ViT"
    if format in found:
        hint = f"write its tensors under names without {found[format]!r} before them"
    elif found:
        hint = f"use --format {list(found)[-1]}"
    raise CheckpointError(
        f"{path} holds no {_LANDMARKS[format]}, which every ViT in {format} format has; {hint}"
    )


def _dialect_name(stored: str, format: str, prefix: str) -> str:
    """The dialect's name of a tensor that the file has under the name `stored`."""
    if format != "transformers":
        return stored.removeprefix(prefix)
    if stored.startswith(_HEADS) or not stored.startswith(prefix):
        return stored
    name = f"vit.{stored.removeprefix(prefix)}"
    for pattern, vit_name in _DINOV2_NAMES.items():
        name = re.sub(pattern, vit_name, name)
    return name


def _flax_dialect(names: Iterable[str]) -> Literal["original", "linen", "big_vision"]:
    names = set(names)
    if "Transformer/posembed_input/pos_embedding" not in names:
        return "big_vision"
    return "original" if any("/MlpBlock_3/" in name for name in names) else "linen"


def _read_json(path: str) -> dict[str, Any]:
    """A configuration beside the weights; empty if there is none."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return {}
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(key) or {}, dict) for key in _TABLES):
        return values
    raise CheckpointError(f"{path} is not a configuration in JSON, or is damaged; copy it again")
