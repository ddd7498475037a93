"""The files of a checkpoint: safetensors written in one hashed pass, read by ranges; and the manifest.

Fragments are 1-D pieces of flattened tensors, named STATE/PARAMETER, in plain safetensors files that any
reader opens. A checkpoint is a folder, or lies below the prefix of an object store: what reads it takes
either.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
import torch
import xxhash
from torch import Tensor

from vitscale import storage

FORMAT, VERSION = "vitscale-checkpoint", 2
READABLE = (1, 2)  # version 1 knew trainable parameters only
FIXED = "fixed"
MANIFEST = "manifest.json"
_BLOCK = 2 << 20  # a buffer that stays in the processor's cache between the read and the hash
_RANGE_BYTES = 64 << 20  # of one read from a store
_MOST = 2**62  # values of a tensor, and bytes: whatever is computed from them fits into 64 bits
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file's size and xxh3-128 in hex."""

    num_bytes: int
    checksum: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A parameter or buffer: its shape, and the (file, start, count) of every fragment of its flattened
    values.

    fixed: it is not trained (a frozen parameter, a buffer), so that "fixed" is its only state.
    """

    shape: tuple[int, ...]
    fragments: tuple[tuple[str, int, int], ...]
    fixed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds. Written last: without it there is no checkpoint.

    states: those of every trained tensor ("fp32", the optimizer's, "ema"). optimizer_steps: updates made
    (skipped ones do not count). loss_scaler: its numbers (fp16), else empty. counters: plain integers of the
    trainer.
    """

    step: int
    samples_seen: int
    epoch: int
    step_in_epoch: int
    data_fingerprint: str
    optimizer: str
    optimizer_steps: int
    states: tuple[str, ...]
    world_size: int
    zero_stage: int
    precision: str
    loss_scaler: dict[str, Any]
    counters: dict[str, int]
    config: dict[str, Any]
    versions: dict[str, str]
    created: str
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]

    def to_bytes(self) -> bytes:
        """As it is written, with a checksum over itself."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "checksum": _digest(values)}, indent=1).encode()

    def digest(self) -> str:
        """A checksum over all that it says."""
        return _digest(dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        """Write it durably to a local file."""
        storage.write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read and check the manifest of a step directory. Raises CheckpointError naming what is wrong."""
        path = storage.child(directory, MANIFEST)
        try:
            values = json.loads(storage.read_bytes(path))
            checksum = values.pop("checksum")
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} holds no {MANIFEST}: it is not a finished checkpoint"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{path} is damaged: it is not a manifest") from None
        if checksum != _digest(values):
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
        name, version = values.pop("format", None), values.pop("version", None)
        if name != FORMAT or version not in READABLE:
            raise CheckpointError(
                f"{path} is a {name} of version {version}; this vitscale reads versions up to {VERSION}"
            )
        try:
            return cls._of(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{path} is no manifest that vitscale wrote: a key, a type, a size or a file name is wrong"
            ) from None

    @classmethod
    def _of(cls, values: dict[str, Any]) -> "Manifest":
        """From plain values. Raises ValueError, or what a wrong type raises: a checksum over itself says
        nothing about who wrote it. Files must lie beside it, and hold the fragments by their sizes.
        """
        values["states"] = tuple(values["states"])
        values["files"] = {name: FileInfo(**info) for name, info in values["files"].items()}
        values["tensors"] = {
            name: TensorInfo(
                shape=_sizes(info["shape"]),
                fragments=tuple((f, s, n) for f, s, n in info["fragments"]),
                fixed=info.get("fixed", False),
            )
            for name, info in values["tensors"].items()
        }
        for key, kind in get_type_hints(cls).items():
            if type(values[key]) is not (get_origin(kind) or kind):
                raise ValueError
        for name, info in values["files"].items():
            _sizes([info.num_bytes])
            if Path(name).name != name or not isinstance(info.checksum, str):
                raise ValueError
        for info in values["tensors"].values():
            for file, start, count in info.fragments:
                whole = type(start) is int and type(count) is int
                if not whole or start < 0 or not 0 <= count <= values["files"][file].num_bytes:
                    raise ValueError
            if type(info.fixed) is not bool:
                raise ValueError
        if not all(isinstance(text, str) for text in (*values["states"], *values["versions"].values())):
            raise ValueError
        if not all(isinstance(number, int) for number in values["counters"].values()):
            raise ValueError
        return cls(**values)

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.files.values())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Write tensors to a safetensors file, one at a time, hashed as they pass, and fsync it."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, shapes, metadata) as writer:
        for name in shapes:
            writer.write(name, tensors[name])
    return writer.info


class SafetensorsWriter:
    """Streams tensors of known shapes to a file: one tensor in memory at a time. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (shape, dtype) in shapes.items():
            start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._prefix = struct.pack("<Q", len(encoded)) + encoded
        self._path, self._expected = path, list(shapes)
        self._hash, self._count = xxhash.xxh3_128(), 0

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self._path, "wb")
        self._put(self._prefix)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; the order is that of `shapes`."""
        assert name == self._expected.pop(0), name
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._put(_bytes_of(flat) if flat.numel() else b"")

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                assert not self._expected, self._expected
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def info(self) -> FileInfo:
        return FileInfo(num_bytes=self._count, checksum=self._hash.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._count += len(data)


class SafetensorsReader:
    """Ranges of the flattened tensors in a safetensors file, read straight into their destination."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        start = self._read_bytes(0, 8)
        (length,) = struct.unpack("<Q", start.ljust(8))
        size = storage.sizes([self._path])[0] or 0
        try:
            if length > size - 8:
                raise ValueError
            text = self._read_bytes(8, 8 + length)
            self.header: dict[str, Any] = json.loads(text, object_pairs_hook=_once_each)
            self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
            _check_header(self.header, self.metadata)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{path} is not a safetensors file, or a damaged one") from None
        self._base = 8 + length
        for name, entry in self.header.items():
            if self._base + entry["data_offsets"][1] > size:
                raise CheckpointError(f"{path} ends inside {name}: it was cut; copy it again")

    def read_into(self, destination: Tensor, name: str, start: int) -> None:
        """destination[:] = tensor.flatten()[start : start + len(destination)], cast to its dtype; destination
        is 1-D.
        """
        entry = self.header.get(name)
        if entry is None or start + len(destination) > math.prod(entry["shape"]):
            raise CheckpointError(f"{self._path} does not hold {len(destination):,} values of {name}")
        dtype = _DTYPES[entry["dtype"]]
        staged = (
            destination.device.type != "cpu" or dtype != destination.dtype or not destination.is_contiguous()
        )
        host = torch.empty(len(destination), dtype=dtype) if staged else destination
        view = _bytes_of(host)
        position = self._base + entry["data_offsets"][0] + start * dtype.itemsize
        while len(view):
            count = self._read(view, position)
            if count == 0:
                raise CheckpointError(f"{self._path} ends inside {name}")
            view, position = view[count:], position + count
        if staged:
            destination.copy_(host)

    def dtype(self, name: str) -> torch.dtype:
        kind = self.header.get(name, {}).get("dtype")
        if kind not in _DTYPES:
            raise CheckpointError(f"{self._path} holds no {name} of a dtype that is known here ({kind})")
        return _DTYPES[kind]

    def _read(self, view: memoryview, position: int) -> int:
        if storage.is_local(self._path):  # not kept open: a checkpoint has as many files as it had ranks
            with open(storage.local_path(self._path), "rb", buffering=0) as file:
                return os.preadv(file.fileno(), [view], position)
        data = self._read_bytes(position, position + min(len(view), _RANGE_BYTES))
        view[: len(data)] = data
        return len(data)

    def _read_bytes(self, start: int, end: int) -> bytes:
        return storage.read_range(self._path, start, end)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key of it comes twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError
    return values


def _check_header(header: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raise ValueError, or what a wrong type raises, unless every tensor has its own bytes."""
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError
    ranges = []
    for entry in header.values():
        shape, ((start,), (end,)) = _sizes(entry["shape"]), [_sizes([at]) for at in entry["data_offsets"]]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype and end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError
        ranges.append((start, end))
    before = 0
    for start, end in sorted(ranges):
        if not before <= start <= end:
            raise ValueError
        before = end


def _sizes(values: Any) -> tuple[int, ...]:
    """Numbers that a tensor's shape, or a place in a file, can be. Raises ValueError for others."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError
    if math.prod(max(1, value) for value in values) > _MOST:
        raise ValueError
    return tuple(values)


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous 1-D tensor on the CPU, without a copy."""
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] (ndarray is a buffer)


def hash_file(path: str | Path) -> FileInfo:
    """Size and checksum of a file as it lies. Raises FileNotFoundError."""
    digest, count = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with storage.open_stream(str(path)) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            count += length
    return FileInfo(num_bytes=count, checksum=digest.hexdigest())


def _digest(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
