"""Plain weights in safetensors: one file, or shards with an index, as Hugging Face writes them.

Only one tensor is in memory at a time, so that a model of any size can be read and written.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.safetensors import SafetensorsReader, SafetensorsWriter, unreplaced
from vitscale.errors import CheckpointError
from vitscale.stores import storage
from vitscale.system import atomic

EXPORT_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
ONNX_NAME = "model.onnx"
Shapes = Mapping[str, tuple[int, ...]]
NamedTensors = Iterable[tuple[str, Tensor]]
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOATS = ("F64", "F32", "BF16", "F16")


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name, in whatever file: all shapes at once, the values tensor by tensor."""

    @property
    def shapes(self) -> Shapes: ...

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, as fp32."""
        ...


class Weights:
    """The tensors of a safetensors file, or of shards with their index (a TensorSource)."""

    def __init__(self, path: str | Path, *, only_floats: bool = True) -> None:
        """path: the file or the index. only_floats: refuse tensors of integers and the like.

        Raises CheckpointError for damaged and missing files, and for such tensors.
        """
        self.path = str(path)
        if self.path.endswith(".json"):
            with unreplaced(self.path):
                self.metadata, file_of = _read_index(self.path)
                places = {file: storage.join(self.path, file) for file in sorted(set(file_of.values()))}
                remedy = "copy it beside the other files"
                readers = {file: _open(place, only_floats, remedy) for file, place in places.items()}
            self.files = list(places.values())
            self._readers = {name: readers[file] for name, file in file_of.items()}
        else:
            self.files = [self.path]
            reader = _open(self.path, only_floats, "give the path of a safetensors file")
            self.metadata, self._readers = reader.metadata, dict.fromkeys(reader.header, reader)
        absent = next((name for name, reader in self._readers.items() if name not in reader.header), None)
        if absent:
            raise CheckpointError(
                f"{path} lists {absent}, which its shard does not hold; copy all files again"
            )
        self.shapes = {name: tuple(reader.header[name]["shape"]) for name, reader in self._readers.items()}

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, as fp32."""
        return self._read(name, torch.float32)

    def stored(self, name: str) -> Tensor:
        """One whole tensor, in the dtype that it is stored in."""
        return self._read(name, self._readers[name].dtype(name))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        flat = torch.empty(math.prod(self.shapes[name]), dtype=dtype)
        self._readers[name].read_into(flat, name, 0)
        return flat.view(self.shapes[name])


def find_export(path: str) -> str:
    """The safetensors file or index of shards that `path` names or contains; "" if none.

    Raises CheckpointError for a file of a checkpoint, whose tensors are pieces.
    """
    if path.endswith((".safetensors", INDEX_NAME)):
        folder, _, name = path.rpartition("/")
        if name.startswith("rank-") and MANIFEST in storage.names_in(folder or "."):
            raise CheckpointError(f"{path} is a part of a checkpoint; give its folder")
        return path
    is_file = storage.is_local(path) and Path(storage.local_path(path)).is_file()
    names = [] if is_file else storage.names_in(path)
    return next((storage.child(path, name) for name in (EXPORT_NAME, INDEX_NAME) if name in names), "")


def write_folder(
    folder: Path,
    tensors: NamedTensors,
    shapes: Shapes,
    dtype: Dtype,
    metadata: Mapping[str, str],
    shard_bytes: int = 0,
) -> str:
    """Write model.safetensors into a folder, or shards and their index.

    shard_bytes: the most bytes of tensors in a file, 0 for no limit. Only a single tensor that
    is larger makes a larger shard. Returns the name of the file or index.
    """
    shards = _split_into_shards(shapes, DTYPES[dtype].itemsize, shard_bytes)
    stream = iter(tensors)
    if len(shards) == 1:
        write_file(folder / EXPORT_NAME, stream, shapes, dtype, metadata)
        return EXPORT_NAME
    file_of = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, stream, {name: shapes[name] for name in names}, dtype, {"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    total = sum(map(math.prod, shapes.values())) * DTYPES[dtype].itemsize
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": file_of}
    atomic.write(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    return INDEX_NAME


def write_file(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Shapes,
    dtype: Dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write the next len(shapes) tensors of the iterator, in their order, to a file."""
    layout = {name: (tuple(shape), DTYPES[dtype]) for name, shape in shapes.items()}
    with SafetensorsWriter(path, layout, metadata) as writer:
        for _ in layout:
            name, tensor = next(tensors)
            writer.write(name, rounded(name, tensor, dtype))
            del tensor  # before the next one is read


def rounded(name: str, tensor: Tensor, dtype: Dtype) -> Tensor:
    """The values rounded to the nearest in `dtype`.

    Raises CheckpointError where a finite value would become infinite.
    """
    cast = tensor.to(DTYPES[dtype])
    if dtype != "fp32" and not cast.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"{name} holds {largest:.4g}, which is too large for {dtype}; use --dtype bf16 or fp32"
        )
    return cast


def _split_into_shards(shapes: Shapes, item_bytes: int, limit: int) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes, or of one tensor; 0 = no limit.

    Example with limit 10: tensors of 4, 6, 2 and 12 bytes make the groups [4, 6], [2], [12].
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += math.prod(shape) * item_bytes
        if limit and size > limit and shards[-1]:
            shards.append([])
            size = math.prod(shape) * item_bytes
        shards[-1].append(name)
    return shards


def _read_index(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """The metadata of an index of shards, and the file of each tensor."""
    data = storage.read_bytes(path)  # not in the try: a StoreError is a ValueError too
    try:
        index: dict[str, Any] = json.loads(data)
        file_of = {str(name): str(file) for name, file in index["weight_map"].items()}
        metadata = {str(key): str(value) for key, value in index.get("metadata", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not an index of safetensors shards, or is damaged") from None
    if not file_of:
        raise CheckpointError(f"{path} names no tensor; copy the index again")
    for file in file_of.values():
        if Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{path} must name files beside it, not {file!r}; copy the index again")
    return metadata, file_of


def _open(path: str, only_floats: bool, if_missing: str) -> SafetensorsReader:
    try:
        reader = SafetensorsReader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {if_missing}") from None
    for name, entry in reader.header.items():
        if only_floats and entry["dtype"] not in _FLOATS:
            raise CheckpointError(f"{path}: {name} is {entry['dtype']}; write it as F32, BF16 or F16")
    return reader
