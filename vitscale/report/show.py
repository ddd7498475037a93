"""Shows one checkpoint or export: facts, tensors in numbers, and config, as text and as JSON.

One function gathers the values and others render them, so the text and the JSON say the same.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vitscale import config as configs
from vitscale.errors import CheckpointError
from vitscale.quantities import counted, size_text
from vitscale.report.contents import Contents, chunks
from vitscale.report.text import damaged_newest, json_values, shape_text, table, when


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorStats:
    """A tensor in numbers; norm, mean and abs_max are those of its finite values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_values: int
    norm: float
    mean: float
    abs_max: float
    num_non_finite: int
    untrained: bool


def measure(contents: Contents) -> list[TensorStats]:
    """The numbers of every tensor of weights; one tensor is in memory at a time."""
    names = tqdm(contents.shapes, unit="tensor", desc="reading", leave=False, disable=None)
    return [
        measure_tensor(name, contents.tensor(name, "fp32"), untrained=name in contents.untrained)
        for name in names
    ]


def measure_tensor(name: str, tensor: Tensor, *, untrained: bool) -> TensorStats:
    """The numbers of one tensor, computed in float64."""
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
        untrained=untrained,
    )


def values_of(contents: Contents, tensors: Sequence[TensorStats]) -> dict[str, Any]:
    """What `tools/checkpoint.py show --json` prints."""
    return {
        "path": contents.path,
        **contents.facts,
        "num_bytes": contents.num_bytes,
        "num_files": contents.num_files,
        "num_parameters": num_parameters(tensors),
        "tensors": [json_values(stats) for stats in tensors],
        "config": contents.config,
    }


def render(contents: Contents, tensors: Sequence[TensorStats], now: datetime.datetime) -> str:
    """The text of `tools/checkpoint.py show`."""
    facts = _export_facts(contents) if contents.is_export else _checkpoint_facts(contents, now)
    labelled = [*facts, *_tensor_facts(contents, tensors)]
    lines = [contents.path, "", *(f"{label:<14}  {text}" for label, text in labelled if text), ""]
    header = ("tensor", "shape", "dtype", "values", "norm", "mean", "abs max", "")
    lines += table(header, [_cells(stats) for stats in tensors], left=(0, 1, 2, 7))
    if contents.config:
        title = "config (the model alone)" if contents.is_export else "config"
        lines += ["", title, "", render_config(contents)]
    return "\n".join(lines).rstrip("\n")


def render_config(contents: Contents) -> str:
    """The config as TOML. Raises CheckpointError if there is none."""
    if not contents.config:
        raise CheckpointError(f"{contents.path} holds no config: it was not written by vitscale")
    # to_toml writes dataclasses, and the classes of the sections belong to a higher layer.
    return configs.to_toml(dataclasses.make_dataclass("Config", contents.config)(**contents.config))


def render_verified(contents: Contents) -> str:
    """The text of `tools/checkpoint.py verify`. Opening the contents verified a checkpoint."""
    files = counted(contents.num_files, "file")
    contained = f"{len(contents.shapes):,} tensors, {contents.num_bytes:,} bytes in {files}"
    if not contents.is_export:
        return f"{contents.path}: {contained}, verified"
    for name in contents.shapes:
        contents.tensor(name, "fp32")
    return f"{contents.path}: {contained}, readable; an export carries no checksums"


def check_newest(contents: Contents) -> None:
    """Raise CheckpointError if the run has a newer checkpoint, which does not verify."""
    if contents.passed_over:
        raise CheckpointError(damaged_newest(contents.passed_over[0], contents.facts["step"]))


def num_parameters(tensors: Sequence[TensorStats]) -> int:
    """The number of values that are trained."""
    return sum(stats.num_values for stats in tensors if not stats.untrained)


def _cells(stats: TensorStats) -> tuple[str, ...]:
    marks = ["fixed"] if stats.untrained else []
    if stats.num_non_finite:
        marks.append(f"{stats.num_non_finite:,} NOT FINITE")
    return (
        stats.name,
        shape_text(stats.shape),
        stats.dtype,
        f"{stats.num_values:,}",
        f"{stats.norm:.5g}",
        f"{stats.mean:.3g}",
        f"{stats.abs_max:.4g}",
        " ".join(marks),
    )


def _export_facts(contents: Contents) -> Iterator[tuple[str, str]]:
    """Label and text of each fact; so do the two below."""
    yield from ((name, str(value)) for name, value in contents.facts.items())
    yield "size", f"{_size_and_files(contents)}; an export carries no checksums"


def _checkpoint_facts(contents: Contents, now: datetime.datetime) -> Iterator[tuple[str, str]]:
    facts = contents.facts
    yield "step", f"{facts['step']:,}"
    yield "samples seen", f"{facts['samples_seen']:,}"
    yield "epoch", f"{facts['epoch']:,}, {facts['step_in_epoch']:,} steps into it"
    scaler = _pairs(facts["loss_scaler"])
    yield "precision", f"{facts['precision']}, loss scaler: {scaler}" if scaler else facts["precision"]
    yield "optimizer", f"{facts['optimizer']}, {facts['optimizer_steps']:,} updates"
    yield "states", ", ".join(facts["states"])
    yield "counters", _pairs(facts["counters"])
    yield "data", facts["data_fingerprint"]
    if "teacher" in facts:
        yield "teacher", f"weights {facts['teacher']}"
    saved, age = when(facts["created"], now)
    yield "saved", f"{saved} ({age} ago)" if age else saved
    yield "written by", f"{counted(facts['world_size'], 'rank')} at ZeRO {facts['zero_stage']}"
    yield "versions", _pairs(facts["versions"])
    yield "size", f"{_size_and_files(contents)}, verified"


def _tensor_facts(contents: Contents, tensors: Sequence[TensorStats]) -> Iterator[tuple[str, str]]:
    num_trained_tensors = sum(not stats.untrained for stats in tensors)
    yield "parameters", f"{num_parameters(tensors):,} in {num_trained_tensors:,} tensors"
    if contents.untrained:
        sizes = [stats.num_values for stats in tensors if stats.untrained]
        yield "fixed values", f"{sum(sizes):,} in {len(sizes):,} tensors"
    num_non_finite = sum(stats.num_non_finite for stats in tensors)
    yield "NOT FINITE", f"{num_non_finite:,} values; the tensors are marked below" if num_non_finite else ""


def _size_and_files(contents: Contents) -> str:
    return f"{size_text(contents.num_bytes)} in {counted(contents.num_files, 'file')}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in values.items()
    )
