"""The manifest of a checkpoint: where its run was, what it holds, and a checksum of every file.

It is written last: a folder without one is not a checkpoint. Fragments are 1-D pieces of
flattened tensors, named SLOT/PARAMETER, in plain safetensors files beside it. A bias of 16
values, saved by three ranks, looks like this:

    {"format": "vitscale-checkpoint", "version": 4,
     "train": {"step": 12000, "data_step": 12000, ...}, "optimizer": "adamw",
     "slots": ["fp32", "exp_avg", "exp_avg_sq"],
     "world_size": 3, "zero_stage": 3, ...
     "tensors": {"norm.bias": {"shape": [16], "untrained": false,
                               "fragments": [[0, 2, 0, 6], [2, 1, 12, 4]]}, ...},
     "files": {"rank-00000.safetensors": {"num_bytes": 9216, "checksum": "5f0c..."}, ...},
     "checksum": "a41b..."}

Fragments of one size are one entry, [first file, number of files, start, count]. Files have
numbers in the order of their names: here files 0 and 1 have 6 values each, from 0 on, and file
2 has 4, from 12 on. So a manifest grows with the tensors and with the ranks, not with their
product. rank-00002.safetensors holds "fp32/norm.bias" and that of each other slot, of 4 values.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin, get_type_hints, overload

import numpy as np
import xxhash

from vitscale import __version__
from vitscale import config as configs
from vitscale.checkpoint.safetensors import FileInfo, check_regular, sizes
from vitscale.engine.fragments import UNTRAINED, Counters
from vitscale.errors import CheckpointError, ConfigError
from vitscale.stores import storage
from vitscale.system import atomic

T = TypeVar("T")
FORMAT, VERSION, READABLE = "vitscale-checkpoint", 4, (1, 2, 3, 4)
MANIFEST = "manifest.json"
_NO_MANIFEST = "{} is damaged: it is not a manifest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run was, and which run it is.

    step: optimizer steps done.
    data_step: global batches consumed; more than `step` once a run has skipped data.
    samples_seen: images trained on.
    bad_samples: samples that could not be used and were replaced.
    rollbacks: how often the run went back to an earlier checkpoint, passing over data.
    steps_per_epoch: steps of one pass through the data; 0 if not known (versions 1 and 2, saved
        in the first epoch).
    data_fingerprint: what every step reads.
    decoder: what decodes it.
    precision: "fp32", "bf16" or "fp16".
    config: the whole config of the run.
    versions: of the packages that it ran with.
    healthy: since the checkpoint before it, no step was skipped (in fp16: only to find the loss
        scale), and losses and gradients were finite. True where it is not known.
    teacher: a digest of a distillation's teacher; "" = there is none.
    """

    step: int
    data_step: int
    samples_seen: int
    bad_samples: int
    steps_per_epoch: int
    data_fingerprint: str
    decoder: str
    precision: str
    config: dict[str, Any]
    versions: dict[str, str]
    healthy: bool = True
    rollbacks: int = 0
    teacher: str = ""

    @property
    def epoch(self) -> int:
        """Completed passes through the data."""
        return self.data_step // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def step_in_epoch(self) -> int:
        return self.data_step - self.epoch * self.steps_per_epoch

    @property
    def writer(self) -> str:
        """The version of vitscale that saved it, for messages."""
        return self.versions.get("vitscale", "another version")


class Fragments(NamedTuple):
    """Consecutive pieces of a flattened tensor, of `count` values each, in consecutive files.

    File file + i, for i below num_files, has the values from start + i * count on.
    """

    file: int
    num_files: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.num_files * self.count


def numbered(files: Iterable[str]) -> dict[str, int]:
    """The number of each file: its place in the order of their names."""
    return {file: number for number, file in enumerate(sorted(files))}


def joined(pieces: np.ndarray) -> tuple[Fragments, ...]:
    """The pieces of one tensor, sorted by start and joined.

    pieces: rows of (file, start, count), [n, 3]. Those of one size that follow one another, in
        files that follow one another, become one entry.
    """
    file, start, count = pieces[np.argsort(pieces[:, 1], kind="stable")].T
    follows = (np.diff(file) == 1) & (np.diff(start) == count[:-1]) & (np.diff(count) == 0)
    firsts = np.flatnonzero(np.append(True, ~follows)[: len(pieces)])
    lengths = np.diff(np.append(firsts, len(pieces)))
    columns = (file[firsts], lengths, start[firsts], count[firsts])
    return tuple(Fragments(*row) for row in np.stack(columns, axis=1).tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A parameter or buffer: its shape, and the fragments of its flattened values.

    untrained: a frozen parameter, a buffer or a statistic of the optimizer, whose only slot is
        "fixed".
    """

    shape: tuple[int, ...]
    fragments: tuple[Fragments, ...]
    untrained: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    optimizer: optim.name of the run.
    slots: what is kept of every trained tensor: "fp32", the optimizer's slots, "ema".
    counters: the engine's step counters.
    loss_scaler: the engine's; empty except in fp16.
    world_size, zero_stage: of the job that wrote it.
    created: ISO 8601.
    """

    train: TrainState
    optimizer: str
    slots: tuple[str, ...]
    counters: Counters
    loss_scaler: dict[str, Any]
    world_size: int
    zero_stage: int
    created: str
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]

    @property
    def step(self) -> int:
        return self.train.step

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.files.values())

    @functools.cached_property
    def file_names(self) -> list[str]:
        """The files by number."""
        return list(numbered(self.files))

    @property
    def of_model(self) -> dict[str, TensorInfo]:
        """The parameters and buffers, without the statistics that an optimizer keeps of them.

        Adafactor's of norm.bias is called exp_avg_sq/norm.bias.
        """
        return {name: info for name, info in self.tensors.items() if "/" not in name}

    def overlapping(self, name: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
        """(file, start, count) of each fragment of a tensor that has values of [start, end)."""
        for fragments in self.tensors[name].fragments:
            first = max(0, (start - fragments.start) // fragments.count)
            last = min(fragments.num_files, -((fragments.start - end) // fragments.count))
            for index in range(first, last):
                file = self.file_names[fragments.file + index]
                yield file, fragments.start + index * fragments.count, fragments.count

    def to_bytes(self) -> bytes:
        """The manifest as it is written, with a checksum of itself."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "checksum": _digest(values)}).encode()

    def save(self, path: Path) -> None:
        """Write the manifest durably to a local file."""
        atomic.write(path, self.to_bytes())

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read and check the manifest of a step directory, of any readable version.

        Raises CheckpointError naming what is wrong, or StoreError if the store does not answer.
        """
        return cls.parse(read_text(directory), directory)

    @classmethod
    def parse(cls, text: str, directory: str | Path) -> "Manifest":
        """As load, from the text of the file, which is named in errors."""
        path = storage.child(directory, MANIFEST)
        try:
            values = json.loads(text)
            checksum = values.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(_NO_MANIFEST.format(path)) from None
        if checksum != _digest(values):
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
        name, version = values.pop("format", None), values.pop("version", None)
        if name != FORMAT or version not in READABLE:
            raise CheckpointError(
                f"{path} is a {name} of version {version}; this vitscale reads versions up to {VERSION}"
            )
        try:
            values = _upgraded(values) if version < 3 else values
            values = _with_joined_fragments(values) if version < 4 else values
            _check_keys(path, values)
            return _parse(values)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise CheckpointError(
                f"{path} was not written by vitscale: a key, a type, a size or a file name in it is wrong"
            ) from None


def read_text(directory: str | Path) -> str:
    """The text of the manifest of a step directory.

    Raises CheckpointError if there is none, or no text, and StoreError if the store does not
    answer.
    """
    path = storage.child(directory, MANIFEST)
    check_regular(path)
    try:
        return storage.read_bytes(path).decode()
    except FileNotFoundError:
        raise CheckpointError(absence(str(directory))) from None
    except UnicodeDecodeError:
        raise CheckpointError(_NO_MANIFEST.format(path)) from None


@overload
def saved_config(schema: type[T], values: Mapping[str, Any], where: str, place: str, writer: str) -> T: ...
@overload
def saved_config(schema: Any, values: Mapping[str, Any], where: str, place: str, writer: str) -> Any: ...
def saved_config(schema: Any, values: Mapping[str, Any], where: str, place: str, writer: str) -> Any:
    """The config, or its section `where`, that vitscale of version `writer` saved at `place`.

    Raises CheckpointError, naming both and a way out, if this version does not read it.
    """
    elsewhere = f'another run_dir with [init] checkpoint = "{place}", full_state = true'
    try:
        return configs.from_dict(schema, values, where)
    except ConfigError as error:
        raise CheckpointError(
            f"{place} holds a config that {_readers(writer)} cannot read: {error}; "
            f"use the version that wrote it, or {'a later one' if where else elsewhere}"
        ) from None


def _readers(writer: Any) -> str:
    return f"this vitscale ({__version__}; it was written by {writer})"


def absence(directory: str) -> str:
    """Why a directory holds no manifest, as a sentence."""
    folder = Path(storage.local_path(directory))
    if folder.is_symlink() and not folder.exists():
        return f"{directory} is a link to {folder.readlink()}, which does not exist"
    if not folder.exists() and not storage.names_in(directory):
        return f"{directory} does not exist; its run may have deleted it (checkpoint.keep_last)"
    return f"{directory} holds no {MANIFEST}: it is not a finished checkpoint"


def _check_keys(path: str, values: dict[str, Any]) -> None:
    """Raise CheckpointError for a key that this version does not know."""
    train = values["train"]
    for kind, prefix, part in (
        (Manifest, "", values),
        (TrainState, "train.", train),
        (Counters, "counters.", values["counters"]),
    ):
        unknown = sorted(set(part) - {field.name for field in dataclasses.fields(kind)})
        if unknown:
            raise CheckpointError(
                f"{path} has the key {prefix}{unknown[0]}, which {_readers(train['versions']['vitscale'])} "
                "does not know; use the version that wrote it, or a later one"
            )


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of version 1 or 2 in the form of version 3.

    In both, the trainer's state was flat, every step consumed one batch, and the decoder was
    part of the fingerprint. Version 1 had trained parameters only.
    """
    step, epoch, step_in_epoch = (values.pop(key) for key in ("step", "epoch", "step_in_epoch"))
    fingerprint, _, decoder = values.pop("data_fingerprint").partition("-")
    counters = dict(values.pop("counters"))
    del values["optimizer_steps"]  # global_steps - skipped_steps
    tensors = {
        name: {
            "shape": info["shape"],
            "fragments": info["fragments"],
            "untrained": info.get(UNTRAINED, False),
        }
        for name, info in values.pop("tensors").items()
    }
    train = {
        "step": step,
        "data_step": step,
        "bad_samples": counters.pop("bad_samples", 0),
        "steps_per_epoch": (step - step_in_epoch) // epoch if epoch else 0,
        "data_fingerprint": fingerprint,
        "decoder": decoder,
        **{key: values.pop(key) for key in ("samples_seen", "precision", "config", "versions")},
    }
    slots = values.pop("states")
    return {**values, "train": train, "slots": slots, "counters": counters, "tensors": tensors}


def _with_joined_fragments(values: dict[str, Any]) -> dict[str, Any]:
    """The values of version 3 in the form of version 4.

    In version 3 each fragment was an entry of its own: [name of its file, start, count].
    """
    numbers, tensors = numbered(values["files"]), {}
    for name, info in values["tensors"].items():
        pieces = [[numbers[file], start, count] for file, start, count in info["fragments"]]
        if not all(type(size) is int for piece in pieces for size in piece):
            raise ValueError
        rows = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        tensors[name] = {**info, "fragments": [list(entry) for entry in joined(rows[rows[:, 2] != 0])]}
    return {**values, "tensors": tensors}


def _parse(values: dict[str, Any]) -> Manifest:
    """The manifest of plain JSON values, not trusted: anybody can write a correct checksum.

    A file must have a plain name, which puts it beside the manifest, and be large enough for
    its fragments. Raises ValueError, or whatever a wrong type raises.
    """
    values = {
        **values,
        "train": TrainState(**values["train"]),
        "counters": Counters(**values["counters"]),
        "slots": tuple(values["slots"]),
        "files": {name: FileInfo(**info) for name, info in values["files"].items()},
        "tensors": {
            name: TensorInfo(
                shape=sizes(info["shape"]),
                fragments=tuple(Fragments(*fragments) for fragments in info["fragments"]),
                untrained=info["untrained"],
            )
            for name, info in values["tensors"].items()
        },
    }
    manifest = Manifest(**values)
    for part in (manifest, manifest.train, manifest.counters):
        for key, kind in get_type_hints(type(part)).items():
            if type(getattr(part, key)) is not (get_origin(kind) or kind):
                raise ValueError
    for name, info in manifest.files.items():
        is_name = name.isprintable() and name.strip(".") and Path(name).name == name
        if not (is_name and isinstance(info.checksum, str) and sizes([info.num_bytes])):
            raise ValueError
    num_bytes = np.array([manifest.files[file].num_bytes for file in manifest.file_names], dtype=np.int64)
    for info in manifest.tensors.values():
        for fragments in info.fragments:
            file, num_files, start, count = fragments
            if not all(type(size) is int for size in fragments) or min(file, start) < 0 or count < 1:
                raise ValueError
            if not 0 < num_files <= len(num_bytes) - file or count > num_bytes[file : file + num_files].min():
                raise ValueError
        if type(info.untrained) is not bool:
            raise ValueError
    if not all(isinstance(text, str) for text in (*manifest.slots, *manifest.train.versions.values())):
        raise ValueError
    return manifest


def _digest(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
