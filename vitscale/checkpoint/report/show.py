"""What one checkpoint or export holds, for people: facts, tensors in numbers, config; as text and as JSON.

Values are gathered by one function and rendered by another, so that the text and the JSON say the same.
"""

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitscale import config as configs
from vitscale import storage
from vitscale.checkpoint.format import CheckpointError, Manifest, SafetensorsReader
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.verify import open_directory
from vitscale.checkpoint.weights import INDEX_NAME, export_at, read_index

CHUNK = 1 << 20  # values looked at at a time, in float64
NOT_FACTS = ("config", "tensors", "files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose files were verified, or an export, to be read tensor by tensor.

    facts: of the manifest, or of the export's metadata. config: sections as nested plain values; an export
    has the model's alone, one of another library none. fixed: tensors that are not trained. read: (tensor,
    state) to the whole tensor; the state "fp32" is the weights.
    """

    path: str
    is_export: bool
    facts: dict[str, Any]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    fixed: frozenset[str]
    states: tuple[str, ...]
    num_bytes: int
    num_files: int
    read: Callable[[str, str], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorStats:
    """A tensor in numbers; norm, mean and abs_max are of its finite values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_values: int
    norm: float
    mean: float
    abs_max: float
    num_non_finite: int
    fixed: bool


def open_checkpoint(path: str) -> Opened:
    """Open a run directory (its newest good checkpoint), a step directory, or weights in safetensors, which
    may be another library's: a file, or the folder of one or of shards.

    Raises CheckpointError for anything else, and for what is damaged.
    """
    export = export_at(path)
    if export:
        return _open_export(export)
    folder, manifest = open_directory(path)
    return Opened(
        path=folder,
        is_export=False,
        facts=facts_of(manifest),
        config=manifest.config,
        shapes={name: info.shape for name, info in manifest.tensors.items()},
        fixed=frozenset(name for name, info in manifest.tensors.items() if info.fixed),
        states=manifest.states,
        num_bytes=manifest.num_bytes,
        num_files=len(manifest.files),
        read=FragmentReader(folder, manifest).whole,
    )


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """All of a manifest but the config and what each file and tensor is."""
    values = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    return {name: value for name, value in values.items() if name not in NOT_FACTS}


def measure(opened: Opened) -> list[TensorStats]:
    """The numbers of every weight; one tensor is in memory at a time."""
    names = tqdm(opened.shapes, unit="tensor", desc="reading", leave=False, disable=None)
    return [_measure(name, opened.read(name, "fp32"), name in opened.fixed) for name in names]


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The flattened values in float64, some at a time."""
    return (part.double() for part in tensor.reshape(-1).split(CHUNK))


def values_of(opened: Opened, tensors: Sequence[TensorStats]) -> dict[str, Any]:
    """What `tools/checkpoint.py show --json` prints."""
    return {
        "path": opened.path,
        **opened.facts,
        "num_bytes": opened.num_bytes,
        "num_files": opened.num_files,
        "num_parameters": num_parameters(tensors),
        "tensors": [dataclasses.asdict(stats) for stats in tensors],
        "config": opened.config,
    }


def render(opened: Opened, tensors: Sequence[TensorStats], now: datetime.datetime) -> str:
    """The text of `tools/checkpoint.py show`."""
    facts = [(name, text) for name, text in _fact_texts(opened, tensors, now) if text]
    rows = [
        (
            stats.name,
            shape_text(stats.shape),
            stats.dtype,
            f"{stats.num_values:,}",
            f"{stats.norm:.5g}",
            f"{stats.mean:.3g}",
            f"{stats.abs_max:.4g}",
            "fixed " * stats.fixed + f"{stats.num_non_finite:,} NOT FINITE" * (stats.num_non_finite > 0),
        )
        for stats in tensors
    ]
    header = ("tensor", "shape", "dtype", "values", "norm", "mean", "abs max", "")
    lines = [*(f"{name:<14}  {text}" for name, text in facts), ""]
    lines += table(header, rows, left=(0, 1, 2, 7))
    if opened.config:
        lines += ["", f"config{' (the model alone)' * opened.is_export}", "", render_config(opened)]
    return "\n".join([opened.path, "", *lines]).rstrip("\n")


def render_config(opened: Opened) -> str:
    """The config as TOML. Raises CheckpointError where there is none."""
    if not opened.config:
        raise CheckpointError(f"{opened.path} holds no config: it was not written by vitscale")
    # to_toml writes dataclasses; the sections' own classes belong to the layer above
    return configs.to_toml(dataclasses.make_dataclass("Config", opened.config)(**opened.config))


def render_verified(opened: Opened) -> str:
    """The text of `tools/checkpoint.py verify`, of what was opened and so verified."""
    held = f"{len(opened.shapes):,} tensors, {opened.num_bytes:,} bytes in {_files(opened)}"
    if not opened.is_export:
        return f"{opened.path}: {held}, verified"
    for name in opened.shapes:
        opened.read(name, "fp32")
    return f"{opened.path}: {held}, readable; an export carries no checksums"


def num_parameters(tensors: Sequence[TensorStats]) -> int:
    """Values that are trained."""
    return sum(stats.num_values for stats in tensors if not stats.fixed)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Lines of columns as wide as they need to be, those whose numbers are in `left` aligned there."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if number in left else '>'}{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def to_json(values: Any) -> str:
    """Pure JSON: numbers that it has no word for become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(values), indent=1, allow_nan=False, ensure_ascii=False)


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def when(created: str, now: datetime.datetime) -> tuple[str, str]:
    """A time of a manifest in local time, and how long ago that was; as it stands where it is no time."""
    try:
        moment = datetime.datetime.fromisoformat(created)
        seconds = (now - moment).total_seconds()
    except (ValueError, TypeError):
        return created, ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{moment.astimezone():%Y-%m-%d %H:%M}", f"{seconds / length:.0f} {unit}"
    return f"{moment.astimezone():%Y-%m-%d %H:%M}", f"{max(0.0, seconds):.0f} s"


def _open_export(path: str) -> Opened:
    try:
        metadata, places = read_index(path) if path.endswith(INDEX_NAME) else ({}, {})
        files = sorted({storage.join(path, file) for file in places.values()}) if places else [path]
        readers = [SafetensorsReader(file) for file in files]
        metadata = dict(metadata or readers[0].metadata)
        held = {name: reader for reader in readers for name in reader.header}
        shapes = {name: tuple(reader.header[name]["shape"]) for name, reader in held.items()}
        dtypes = {name: reader.dtype(name) for name, reader in held.items()}
        model = json.loads(metadata.pop("vitscale.model", "{}"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path} is not a safetensors file, or a damaged one; give a run directory, a step directory, or "
            "an export"
        ) from None

    def read(name: str, state: str) -> Tensor:
        assert state == "fp32", state
        flat = torch.empty(math.prod(shapes[name]), dtype=dtypes[name])
        held[name].read_into(flat, name, 0)
        return flat.view(shapes[name])

    facts = {name.removeprefix("vitscale."): value for name, value in metadata.items()}
    step = str(facts.get("step", ""))
    return Opened(
        path=path,
        is_export=True,
        facts={**facts, "step": int(step)} if step.isdigit() else facts,
        config={"model": model} if model else {},
        shapes=shapes,
        fixed=frozenset(),
        states=("fp32",),
        num_bytes=sum(size or 0 for size in storage.sizes(files)),
        num_files=len(files),
        read=read,
    )


def _measure(name: str, tensor: Tensor, fixed: bool) -> TensorStats:
    squares, total, abs_max, num_non_finite = 0.0, 0.0, 0.0, 0
    for chunk in chunks(tensor):
        square = float(chunk.dot(chunk))
        if not math.isfinite(square):
            finite = chunk[chunk.isfinite()]
            num_non_finite += len(chunk) - len(finite)
            chunk, square = finite, float(finite.dot(finite))
        squares, total = squares + square, total + float(chunk.sum())
        if len(chunk):
            abs_max = max(abs_max, float(chunk.abs().max()))
    return TensorStats(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_values=tensor.numel(),
        norm=math.sqrt(squares),
        mean=total / max(1, tensor.numel() - num_non_finite),
        abs_max=abs_max,
        num_non_finite=num_non_finite,
        fixed=fixed,
    )


def _fact_texts(
    opened: Opened, tensors: Sequence[TensorStats], now: datetime.datetime
) -> Iterator[tuple[str, str]]:
    """Label and text of the facts at the top."""
    facts = opened.facts
    if opened.is_export:
        yield from ((name, str(value)) for name, value in facts.items())
        yield "size", f"{size_text(opened.num_bytes)} in {_files(opened)}; an export carries no checksums"
    else:
        saved, age = when(facts["created"], now)
        yield "step", f"{facts['step']:,}"
        yield "samples seen", f"{facts['samples_seen']:,}"
        yield "epoch", f"{facts['epoch']:,}, {facts['step_in_epoch']:,} steps into it"
        yield "precision", facts["precision"] + _pairs(facts["loss_scaler"], ", loss scaler: ")
        yield "optimizer", f"{facts['optimizer']}, {facts['optimizer_steps']:,} updates"
        yield "states", ", ".join(facts["states"])
        yield "counters", _pairs(facts["counters"])
        yield "data", facts["data_fingerprint"]
        yield "saved", f"{saved} ({age} ago)" if age else saved
        yield (
            "written by",
            f"{facts['world_size']:,} rank{'s' * (facts['world_size'] != 1)} at ZeRO "
            + str(facts["zero_stage"]),
        )
        yield "versions", _pairs(facts["versions"])
        yield "size", f"{size_text(opened.num_bytes)} in {_files(opened)}, verified"
    yield "parameters", f"{num_parameters(tensors):,} in {sum(not one.fixed for one in tensors):,} tensors"
    if opened.fixed:
        others = [stats.num_values for stats in tensors if stats.fixed]
        yield "fixed values", f"{sum(others):,} in {len(others):,} tensors"
    broken = sum(stats.num_non_finite for stats in tensors)
    yield "NOT FINITE", f"{broken:,} values; the tensors are marked below" if broken else ""


def size_text(num_bytes: int) -> str:
    return f"{tqdm.format_sizeof(num_bytes)}B"


def _files(opened: Opened) -> str:
    return f"{opened.num_files:,} file{'s' * (opened.num_files != 1)}"


def _pairs(values: Mapping[str, Any], before: str = "") -> str:
    texts = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in values.items()
    ]
    return before + ", ".join(texts) if texts else ""


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
