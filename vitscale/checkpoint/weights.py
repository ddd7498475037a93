"""Plain weights in safetensors: one file, or shards with an index, as Hugging Face lays them out.

A tensor is in memory only while it is read or written, so that no model is too large for the machine.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitscale import storage
from vitscale.checkpoint.format import CheckpointError, SafetensorsReader, SafetensorsWriter
from vitscale.checkpoint.store import numel

EXPORT_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
Shapes = Mapping[str, tuple[int, ...]]
NamedTensors = Iterable[tuple[str, Tensor]]
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOATS = ("F64", "F32", "BF16", "F16")


class Weights:
    """The named tensors of a safetensors file, or of shards: shapes and metadata at once, values one by
    one.
    """

    def __init__(self, path: str | Path) -> None:
        """path: the file, or the index of the shards. Raises CheckpointError for what is damaged."""
        self.path = str(path)
        if self.path.endswith(".json"):
            self.metadata, places = read_index(self.path)
            files = {name: _open(storage.join(self.path, name)) for name in sorted(set(places.values()))}
            self._readers = {name: files[file] for name, file in places.items()}
        else:
            file = _open(self.path)
            self.metadata, self._readers = file.metadata, dict.fromkeys(file.header, file)
        absent = next((name for name, file in self._readers.items() if name not in file.header), None)
        if absent:
            raise CheckpointError(
                f"{path} names {absent}, which its shard does not hold; copy all files again"
            )
        self.shapes = {name: tuple(file.header[name]["shape"]) for name, file in self._readers.items()}

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, as fp32."""
        flat = torch.empty(numel(self.shapes[name]))
        self._readers[name].read_into(flat, name, 0)
        return flat.view(self.shapes[name])


def export_at(path: str) -> str:
    """The safetensors file, or the index of its shards, that a path means; "" if it means neither."""
    if path.endswith((".safetensors", INDEX_NAME)):
        return path
    is_file = storage.is_local(path) and Path(storage.local_path(path)).is_file()
    names = [] if is_file else storage.names_in(path)
    return next((storage.child(path, name) for name in (EXPORT_NAME, INDEX_NAME) if name in names), "")


def write_file(
    path: Path, tensors: NamedTensors, shapes: Shapes, dtype: Dtype, metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, tensor by tensor; `tensors` come in the order of `shapes`."""
    _write_part(path, iter(tensors), shapes, dtype, metadata)


def write_folder(
    folder: Path,
    tensors: NamedTensors,
    shapes: Shapes,
    dtype: Dtype,
    metadata: Mapping[str, str],
    shard_bytes: int = 0,
) -> str:
    """Write model.safetensors into a folder, or where that would exceed `shard_bytes` (0 = no limit) shards
    of at most that size, if no single tensor is larger, with their index. Returns the name of the file or
    index.
    """
    parts = _cut(shapes, DTYPES[dtype].itemsize, shard_bytes)
    stream = iter(tensors)
    if len(parts) == 1:
        _write_part(folder / EXPORT_NAME, stream, shapes, dtype, metadata)
        return EXPORT_NAME
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_part(folder / file, stream, {name: shapes[name] for name in part}, dtype, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(map(numel, shapes.values())) * DTYPES[dtype].itemsize
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": places}
    storage.write_atomic(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    return INDEX_NAME


def _write_part(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Shapes,
    dtype: Dtype,
    metadata: Mapping[str, str],
) -> None:
    kinds = {name: (tuple(shape), DTYPES[dtype]) for name, shape in shapes.items()}
    with SafetensorsWriter(path, kinds, metadata) as writer:
        for _ in kinds:
            name, tensor = next(tensors)
            writer.write(name, rounded(name, tensor, dtype))
            del tensor  # before the next one is read


def rounded(name: str, tensor: Tensor, dtype: Dtype) -> Tensor:
    """The values in `dtype`, to nearest. Raises CheckpointError where a finite one would become infinite."""
    cast = tensor.to(DTYPES[dtype])
    if dtype != "fp32" and not cast.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"{name} holds {largest:.4g}, which is beyond {dtype}; use --dtype bf16 or fp32"
        )
    return cast


def _cut(shapes: Shapes, item_bytes: int, limit: int) -> list[list[str]]:
    """Names in order, in parts of at most `limit` bytes or of one tensor; one part if limit is 0."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += numel(shape) * item_bytes
        if limit and size > limit and parts[-1]:
            parts.append([])
            size = numel(shape) * item_bytes
        parts[-1].append(name)
    return parts


def read_index(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Metadata, and the file of each tensor."""
    try:
        index: dict[str, Any] = json.loads(storage.read_bytes(path))
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
        metadata = {str(key): str(value) for key, value in index.get("metadata", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not an index of safetensors shards, or a damaged one") from None
    outside = next((file for file in places.values() if Path(file).name != file), None)
    if outside or not places:
        raise CheckpointError(f"{path} must name files beside it, not {outside!r}; copy the index again")
    return metadata, places


def _open(path: str) -> SafetensorsReader:
    try:
        reader = SafetensorsReader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it beside the other files") from None
    for name, entry in reader.header.items():
        if entry["dtype"] not in _FLOATS:
            raise CheckpointError(f"{path}: {name} is {entry['dtype']}; write it as F32, BF16 or F16")
    return reader
