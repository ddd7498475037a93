"""What a checkpoint or an export contains, opened the same way for show, verify and diff."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.store import step_of
from vitscale.checkpoint.verify import open_directory
from vitscale.errors import CheckpointError
from vitscale.stores import storage
from vitscale.weights.files import Weights, find_export

CHUNK = 1 << 20  # values that are looked at together, in float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint whose files were verified, or an export.

    facts: of the manifest, or of the export's metadata. config: the sections as nested plain
    values; an export has [model] alone, another library's file nothing. statistics: shapes of
    what the optimizer keeps of whole parameters. untrained: the names of frozen parameters and
    buffers. slots: "fp32" is the weights. passed_over: the run's newer steps, which do not
    verify. has: whether a slot is kept of a tensor. tensor: one whole tensor by name and slot,
    in the dtype that it is stored in.
    """

    path: str
    is_export: bool
    facts: dict[str, Any]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    statistics: dict[str, tuple[int, ...]]
    untrained: frozenset[str]
    slots: tuple[str, ...]
    num_bytes: int
    num_files: int
    passed_over: tuple[int, ...]
    has: Callable[[str, str], bool]
    tensor: Callable[[str, str], Tensor]


def open_contents(path: str) -> Contents:
    """Open a checkpoint or an export.

    path: a run directory (its newest good checkpoint), a step directory, or weights in
    safetensors, even of another library: a file, or the folder of one or of shards. Raises
    CheckpointError for anything else, and for damage.
    """
    export = find_export(path)
    if export:
        return _open_export(export)
    checkpoint = open_directory(path)
    folder, manifest = checkpoint.folder, checkpoint.manifest
    reader, of_model = FragmentReader(folder, manifest), manifest.of_model
    return Contents(
        path=folder,
        is_export=False,
        facts=facts_of(manifest),
        config=manifest.train.config,
        shapes={name: info.shape for name, info in of_model.items()},
        statistics={name: info.shape for name, info in manifest.tensors.items() if name not in of_model},
        untrained=frozenset(name for name, info in of_model.items() if info.untrained),
        slots=manifest.slots,
        num_bytes=manifest.num_bytes,
        num_files=len(manifest.files),
        passed_over=tuple(
            step for folder in checkpoint.passed_over if (step := step_of(folder) or 0) > manifest.step
        ),
        has=lambda name, slot: reader.dtype(name, slot) is not None,
        tensor=reader.whole,
    )


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says of a run and its state, besides the config, tensors and files.

    The names are those that `show` prints and that are keys of its JSON.
    """
    train = manifest.train
    return {
        "step": train.step,
        "data_step": train.data_step,
        "samples_seen": train.samples_seen,
        "epoch": train.epoch,
        "step_in_epoch": train.step_in_epoch,
        "data_fingerprint": f"{train.data_fingerprint}-{train.decoder}",
        **({"teacher": train.teacher} if train.teacher else {}),
        "optimizer": manifest.optimizer,
        "optimizer_steps": manifest.counters.updates,
        "states": manifest.slots,
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "precision": train.precision,
        "loss_scaler": manifest.loss_scaler,
        "counters": {**dataclasses.asdict(manifest.counters), "bad_samples": train.bad_samples},
        "versions": train.versions,
        "created": manifest.created,
    }


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The flattened values in float64, CHUNK at a time."""
    return (part.double() for part in tensor.reshape(-1).split(CHUNK))


def _open_export(path: str) -> Contents:
    weights = Weights(path, only_floats=False)
    facts: dict[str, Any] = dict(weights.metadata)
    model = _parse_model(path, facts.pop("vitscale.model", "{}"))
    facts = {name.removeprefix("vitscale."): value for name, value in facts.items()}
    if facts.get("step", "").isdecimal() and len(facts["step"]) < 20:
        facts["step"] = int(facts["step"])
    return Contents(
        path=path,
        is_export=True,
        facts=facts,
        config={"model": model} if model else {},
        shapes=weights.shapes,
        statistics={},
        untrained=frozenset(),
        slots=("fp32",),
        num_bytes=sum(size or 0 for size in storage.sizes(weights.files)),
        num_files=len(weights.files),
        passed_over=(),
        has=lambda name, slot: slot == "fp32",
        tensor=lambda name, slot: weights.stored(name),
    )


def _parse_model(path: str, text: str) -> Any:
    """The model's configuration in an export's metadata."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has damaged metadata (vitscale.model); copy it again") from None
