"""Exports to other libraries and imports from them: timm, transformers, Google's .npz files.

Both ways stream: each tensor is read, laid out for the other side and written before the next.
What the other side cannot express is refused before anything is written.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitscale.checkpoint.manifest import saved_config
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import Model, ModelConfig, empty_model
from vitscale.models.names import Dialect, our_shapes, rules, their_shapes, to_ours, to_theirs
from vitscale.models.posemb import sincos2d
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.stores import storage
from vitscale.system import atomic
from vitscale.weights.export import OTHER_FILES, export_metadata, export_safetensors, write_export
from vitscale.weights.files import Dtype, write_folder
from vitscale.weights.foreign import configs, deduce
from vitscale.weights.foreign.folding import fold
from vitscale.weights.foreign.pixels import OURS, Pixels, choose, fold_pixels
from vitscale.weights.foreign.sources import ForeignWeights, open_npz, open_safetensors
from vitscale.weights.npz import write_npz
from vitscale.weights.onnx import export_onnx
from vitscale.weights.publish import publishing
from vitscale.weights.saved import SavedModel, Slot

logger = logging.getLogger(__name__)
Format = Literal["safetensors", "timm", "transformers", "npz"]
ExportFormat = Literal[Format, "onnx"]
FlaxDialect = Literal["original", "linen", "big_vision"]
_FORMAT_OF: dict[str, ExportFormat] = {".npz": "npz", ".onnx": "onnx"}


def export_model(
    path: str | Path,
    out: str | Path,
    *,
    format: ExportFormat | None = None,
    dialect: FlaxDialect = "original",
    dtype: Dtype = "fp32",
    shard_mb: int = 0,
    slot: Slot = "fp32",
) -> Path:
    """Write a checkpoint's weights in a library's format; returns the folder's or file's path.

    path, slot: as in SavedModel. out: a folder; for npz a file name ending in .npz, and for
    safetensors and onnx a folder or a file name. format: None = npz for FILE.npz, onnx for
    FILE.onnx, else safetensors.
    dialect: the names in an .npz file. Before anything is written, raises ConfigError for
    options that contradict each other, and CheckpointError for what the format cannot hold.
    """
    if shard_mb < 0:
        raise ConfigError(f"--shard-mb {shard_mb} must not be negative")
    out = storage.local_output(out)
    format = format or _FORMAT_OF.get(out.suffix, "safetensors")
    if format == "safetensors":
        return export_safetensors(path, out, dtype=dtype, shard_bytes=shard_mb * 10**6, slot=slot)
    if format == "onnx":
        if dtype != "fp32" or shard_mb:
            raise ConfigError("an ONNX file is fp32 and whole; drop --dtype and --shard-mb")
        return export_onnx(path, out, slot=slot)
    saved = SavedModel(path, slot=slot)
    saved.empty_model()  # refuses tensors that are not those of the model
    if format == "npz":
        return _export_npz(saved, out, dialect, dtype, shard_mb)
    return _export_folder(saved, out, format, dtype, shard_mb * 10**6)


def import_model(
    file: str | Path,
    out: str | Path,
    *,
    format: Format,
    overrides: Sequence[str] = (),
    pixels: Pixels | None = None,
) -> Path:
    """Make an fp32 export from another library's weights; returns the path of its file.

    file: an .npz file, a safetensors file, or the folder of one or of shards, with config.json
    beside them if the library writes one. overrides: model.key=value for what no file says.
    pixels: how its images were normalised, where no file beside it says so; where they are not
    as ours, the patch embedding is changed to take our pixels. out: as in write_export. Before
    anything is written, raises CheckpointError for weights that none of our models has and for
    unknown or contradictory pixels, and ConfigError for wrong overrides.
    """
    out = storage.local_output(out)
    source, config, step = _open_foreign(file, format, overrides)
    normalisation = choose(str(file), source.dialect, source.normalisation, pixels)
    if normalisation != OURS and config.kind != "vit":
        what = f"--pixels {pixels}" if pixels else f"pixels of {normalisation}"
        way_out = "; Google's models take our pixels, so drop it" if pixels else ""
        raise CheckpointError(
            f"{file}: {what} cannot be folded into a ResNet, whose first convolution is standardised{way_out}"
        )
    if source.dialect == "timm" and config.kind == "hybrid":
        logger.warning(
            "timm computes hybrids with other epsilons than Google and vitscale: logits differ a little"
        )
    table, shapes = rules(source.dialect, config), our_shapes(config)
    tensors = to_ours(table, source.tensor)
    if normalisation != OURS:
        logger.info("its pixels had %s: folded into the patch embedding", normalisation)
        tensors = fold_pixels(tensors, normalisation)
    shapes = {name: shapes[name] for rule in table for name in rule.ours}
    metadata = export_metadata(config, step, "fp32") | {"vitscale.imported_from": Path(file).name}
    written = write_export(out, tensors, shapes, metadata)
    logger.info("imported %d tensors as %s", len(shapes), config)
    return written


def load_npz(path: str | Path) -> Model:
    """The model of an .npz file of Google's or of ours, fp32 on the CPU, in eval mode.

    As import_model without options, but nothing is written.
    """
    source, config, _ = _open_foreign(path, "npz")
    model = empty_model(config).allocate("cpu")
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in to_ours(rules(source.dialect, config), source.tensor):
            params[name].copy_(tensor)
    return model.eval()


def _open_foreign(
    file: str | Path, format: Format, overrides: Sequence[str] = ()
) -> tuple[ForeignWeights, ModelConfig, int]:
    """Another library's weights, the model that has exactly these, and its step."""
    source = open_npz(str(file)) if format == "npz" else open_safetensors(str(file), format)
    try:
        source = fold(source)
        return source, _config_of(source, overrides), _step_of(source)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{file}: {error}") from None


def _config_of(source: ForeignWeights, overrides: Sequence[str]) -> ModelConfig:
    """The model with exactly the tensors of the source; a file that vitscale wrote names it."""
    named_model = source.metadata.get("vitscale.model")
    if named_model:
        values = _parse_model(named_model)
        writer = source.metadata.get("vitscale.version", "another version")
        saved_config(ModelConfig, values, "model", "its metadata", writer)
        config = deduce.build_config(values, overrides)
    else:
        config = deduce.deduce_config(source.dialect, source.shapes, source.config_json, overrides)
    deduce.check_tensors(source.dialect, config, source.shapes)
    return config


def _parse_model(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError("the model in its metadata (vitscale.model) is damaged; copy it again")
    return values


def _step_of(source: ForeignWeights) -> int:
    step = source.metadata.get("vitscale.step", "0")
    if not (step.isascii() and step.isdigit() and len(step) < 20):
        raise CheckpointError(
            f"the step in its metadata (vitscale.step) is {step[:40]!r}, not a number; copy it again"
        )
    return int(step)


def _export_npz(saved: SavedModel, out: Path, dialect: FlaxDialect, dtype: Dtype, shard_mb: int) -> Path:
    names = _npz_names(saved.config, dialect)
    configs.check_expressible(saved.config, names)
    if dtype == "bf16":
        raise ConfigError("NumPy has no bfloat16, so an .npz file is fp32 or fp16; use --dtype fp16")
    if out.suffix != ".npz" or shard_mb:
        raise ConfigError(f"{out} must be one file whose name ends in .npz, without --shard-mb")
    for key_value in configs.unlike_google(saved.config):
        logger.warning("readers of .npz files compute Google's model, but this one has %s", key_value)
    config = saved.config
    if isinstance(config, ViTConfig) and names != "big_vision":
        config = dataclasses.replace(config, posemb="learned")
    tensors = to_theirs(rules(names, saved.config), functools.partial(_our_tensor, saved))
    with publishing(out) as temporary:
        write_npz(temporary, tensors, dtype, export_metadata(config, saved.step, dtype))
    return out


def _npz_names(config: ModelConfig, dialect: FlaxDialect) -> Dialect:
    """The dialect of a model's .npz file. Raises ConfigError for one that is of ViTs alone."""
    if not isinstance(config, ResNetConfig):
        return dialect
    if dialect != "original":
        raise ConfigError(f"--dialect {dialect} is of ViTs; a ResNet's .npz has BiT's names, so drop it")
    return "bit"


def _export_folder(
    saved: SavedModel, out: Path, format: Literal["timm", "transformers"], dtype: Dtype, shard_bytes: int
) -> Path:
    config = saved.config
    configs.check_expressible(config, format)
    assert isinstance(config, ViTConfig), "these formats hold no other kind"
    if out.suffix in (".safetensors", *OTHER_FILES):
        raise ConfigError(f"{out} must be a folder: {format} reads config.json beside the weights")
    if format == "timm" and shard_bytes:
        raise ConfigError("timm reads one model.safetensors, no shards; drop --shard-mb")
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
    tensors = to_theirs(rules(format, config), functools.partial(_our_tensor, saved))
    with publishing(out) as temporary:
        temporary.mkdir()
        write_folder(temporary, tensors, their_shapes(format, config), dtype, metadata, shard_bytes)
        for name, values in files.items():
            atomic.write(temporary / name, (json.dumps(values, indent=2) + "\n").encode())
    return out


def _our_tensor(saved: SavedModel, name: str) -> Tensor:
    """A tensor of ours by name. A fixed position embedding, which is not saved, is computed."""
    config = saved.config
    if name != "pos_embed" or not isinstance(config, ViTConfig) or config.posemb == "learned":
        return saved.tensor(name)
    table = sincos2d(config.grid, config.resolved_width)  # [1, N, D]
    prefix = table.new_zeros(1, config.num_positions - table.shape[1], table.shape[2])
    return torch.cat([prefix, table], dim=1)
