"""Weights for other libraries, and from them: timm, transformers, and Google's .npz files.

Both ways stream: a tensor is read, laid out anew and written before the next one. What the other side has no
words for is refused before anything is written.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitscale import storage
from vitscale.checkpoint.export import (
    SavedModel,
    State,
    export_metadata,
    export_safetensors,
    write_export,
)
from vitscale.checkpoint.foreign import configs, deduce
from vitscale.checkpoint.foreign.npz import write_npz
from vitscale.checkpoint.foreign.sources import Source, open_npz, open_safetensors
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.publish import publishing
from vitscale.checkpoint.weights import Dtype, write_folder
from vitscale.config import ConfigError
from vitscale.models.names import our_shapes, rules, their_shapes, to_ours, to_theirs
from vitscale.models.posemb import sincos2d
from vitscale.models.vit import ModelConfig

logger = logging.getLogger(__name__)
Format = Literal["safetensors", "timm", "transformers", "npz"]
FlaxDialect = Literal["original", "linen", "big_vision"]
Pixels = Literal["half", "imagenet"]

# How models take pixels in [0, 1]: (mean, deviation) per channel. Ours is "half".
_PIXELS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def export_model(
    path: str | Path,
    out: str | Path,
    *,
    format: Format,
    dialect: FlaxDialect = "original",
    dtype: Dtype = "fp32",
    shard_mb: int = 0,
    state: State = "fp32",
) -> Path:
    """Write the weights of a checkpoint in a library's format.

    path, state: as SavedModel. out: a folder; for npz a file name ending in .npz; for safetensors either.
    dialect: the names in an .npz file. Returns the path of the folder or file. Raises CheckpointError or
    ConfigError, before anything is written, for what the format cannot hold.
    """
    if shard_mb < 0:
        raise CheckpointError(f"--shard-mb {shard_mb} must not be negative")
    if format == "safetensors":
        return export_safetensors(path, out, dtype=dtype, shard_bytes=shard_mb * 10**6, state=state)
    saved = SavedModel(path, state=state)
    if format == "npz":
        return _export_npz(saved, Path(out), dialect, dtype, shard_mb)
    return _export_folder(saved, Path(out), format, dtype, shard_mb * 10**6)


def import_model(
    file: str | Path,
    out: str | Path,
    *,
    format: Format,
    overrides: Sequence[str] = (),
    pixels: Pixels = "half",
) -> Path:
    """Make an export of ours, fp32, from another library's weights, each of which must have its place in our
    model.

    file: an .npz file, a safetensors file, or the folder of one or of its shards, with config.json beside it
    where the library writes one. overrides: model.key=value for what the file does not say. pixels: how
    its images were normalised; other than "half", the difference goes into the patch embedding. out: as
    write_export. Returns the path of the file. Raises CheckpointError or ConfigError, before anything is
    written, for what our model cannot hold.
    """
    source = open_npz(str(file)) if format == "npz" else open_safetensors(str(file), format)
    try:
        config, step = _config_of(source, overrides), _step_of(source)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if pixels == "half" and any(abs(mean - 0.5) > 0.01 for mean in source.pixel_mean):
        logger.warning("its images had mean %s, ours have 0.5: consider --pixels imagenet", source.pixel_mean)
    table, shapes = rules(source.dialect, config), our_shapes(config)
    tensors = to_ours(table, source.read)
    if pixels != "half":
        tensors = _with_our_pixels(tensors, *_PIXELS[pixels])
    shapes = {name: shapes[name] for rule in table for name in rule.ours}
    metadata = export_metadata(config, step, "fp32") | {"vitscale.imported_from": Path(file).name}
    written = write_export(Path(out), tensors, shapes, metadata)
    logger.info("imported %d tensors as %s", len(shapes), config)
    return written


def _config_of(source: Source, overrides: Sequence[str]) -> ModelConfig:
    """The model whose tensors are exactly those of the source; what we wrote says itself which one it is."""
    ours = source.metadata.get("vitscale.model")
    if ours:
        config = deduce.filled(_plain_model(ours), overrides)
    else:
        config = deduce.model_config(source.dialect, source.shapes, source.config_json, overrides)
    deduce.check_tensors(source.dialect, config, source.shapes)
    return config


def _plain_model(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError("what it says of its model (vitscale.model) is damaged; copy it again")
    return values


def _step_of(source: Source) -> int:
    step = source.metadata.get("vitscale.step", "0")
    if not (step.isascii() and step.isdigit()):
        raise ConfigError(f"what it says of its step (vitscale.step) is {step!r}, no number; copy it again")
    return int(step)


def _export_npz(saved: SavedModel, out: Path, dialect: FlaxDialect, dtype: Dtype, shard_mb: int) -> Path:
    configs.check_expressible(saved.config, dialect)
    if dtype == "bf16":
        raise CheckpointError("NumPy has no bfloat16, so an .npz file is fp32 or fp16; use --dtype fp16")
    if out.suffix != ".npz" or shard_mb:
        raise CheckpointError(f"{out} must be one file whose name ends in .npz, without --shard-mb")
    for unsaid in configs.unsaid_in_npz(saved.config):
        logger.warning("readers of .npz files compute Google's model, but this one has %s", unsaid)
    table, config = rules(dialect, saved.config), saved.config
    if dialect != "big_vision":
        config = dataclasses.replace(config, posemb="learned")
    with publishing(out) as temporary:
        metadata = export_metadata(config, saved.step, dtype)
        write_npz(temporary, to_theirs(table, _reader(saved)), dtype, metadata)
    return out


def _export_folder(
    saved: SavedModel, out: Path, format: Literal["timm", "transformers"], dtype: Dtype, shard_bytes: int
) -> Path:
    config = saved.config
    configs.check_expressible(config, format)
    if out.suffix in (".safetensors", ".npz") or (format == "timm" and shard_bytes):
        raise CheckpointError(f"{out} must be a folder; for {format} with one model.safetensors in it")
    files = {"config.json": configs.timm_config(config)}
    if format == "transformers":
        files = {
            "config.json": configs.transformers_config(config, dtype),
            "preprocessor_config.json": configs.preprocessor_config(config),
        }
    metadata = {
        "format": "pt",
        "vitscale.export": format,
        "vitscale.step": str(saved.step),
        "vitscale.dtype": dtype,
    }
    tensors = to_theirs(rules(format, config), _reader(saved))
    with publishing(out) as temporary:
        temporary.mkdir()
        write_folder(temporary, tensors, their_shapes(format, config), dtype, metadata, shard_bytes)
        for name, values in files.items():
            storage.write_atomic(temporary / name, (json.dumps(values, indent=2) + "\n").encode())
    return out


def _with_our_pixels(
    tensors: Iterable[tuple[str, Tensor]], mean: Sequence[float], std: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """The same model for pixels p in [0, 1] given as x = (p - 0.5) / 0.5 instead of (p - mean) / std, which
    is 0.5 / std x + (0.5 - mean) / std: the patch embedding, weight before bias, takes both in.
    """
    scale = (0.5 / torch.tensor(std, dtype=torch.float64))[:, None]
    shift = ((0.5 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64))[
        :, None
    ]
    added = torch.zeros(())
    for name, tensor in tensors:
        if name == "patch_embed.proj.weight":
            kernel = tensor.double().unflatten(1, (3, -1))  # [D, 3, P P]
            tensor, added = (kernel * scale).flatten(1).float(), (kernel * shift).sum((1, 2))
        elif name == "patch_embed.proj.bias":
            tensor = (tensor + added).float()
        yield name, tensor


def _reader(saved: SavedModel) -> Callable[[str], Tensor]:
    """Our tensors by name; a fixed position embedding, which is no parameter, as if it were one."""

    def read(name: str) -> Tensor:
        if name != "pos_embed" or saved.config.posemb == "learned":
            return saved.tensor(name)
        table = sincos2d(saved.config.grid, saved.config.resolved_width)
        prefix = table.new_zeros(1, saved.config.num_tokens - table.shape[1], table.shape[2])
        return torch.cat([prefix, table], dim=1)

    return read
