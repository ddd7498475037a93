"""Plain safetensors files: written and hashed in one pass, read by ranges of a tensor.

What is read may be local or in a store. The format is a length, a JSON header, and the values:

    8 bytes    the length of the header, little endian
    header     {"fp32/norm.bias": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, ...}
    values     each tensor at its data_offsets, counted from the end of the header
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.stores import storage

_BLOCK = 2 << 20  # small enough to stay in the processor's cache between the read and the hash

RANGE_BYTES = 64 << 20  # the most that one read asks for

_GAP_BYTES = 4 << 10  # what is read for nothing rather than with another request

_MOST = 2**62  # values of a tensor, or bytes of a file: keeps arithmetic on them within 64 bits

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInfo:
    """The size of a file, and its xxh3-128 in hex."""

    num_bytes: int
    checksum: str


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Write tensors to a safetensors file, hashing them on the way, and fsync it."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, shapes, metadata) as writer:
        for name in shapes:
            writer.write(name, tensors[name])
    return writer.info


class SafetensorsWriter:
    """Streams tensors of known shapes to a file, one in memory at a time; a context manager."""

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
        encoded += b" " * (-len(encoded) % 8)  # so that the values are aligned
        self._prefix = struct.pack("<Q", len(encoded)) + encoded
        self._path, self._expected = path, list(shapes)
        self._hash, self._count = xxhash.xxh3_128(), 0

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self._path, "wb")
        self._put(self._prefix)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, in the order of `shapes`."""
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
    """Reads ranges of flattened tensors from a file straight into their destination.

    Raises CheckpointError if the file is not safetensors, damaged, or cut short, and if a local
    one was replaced or written since its header was read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        check_regular(self._path)
        is_local = storage.is_local(self._path)
        self._identity = _identity(os.stat(storage.local_path(self._path))) if is_local else None
        (length,) = struct.unpack("<Q", self._read_bytes(0, 8).ljust(8))
        size = storage.sizes([self._path])[0] or 0
        text = self._read_bytes(8, 8 + length) if length <= size - 8 else b""
        try:
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
        """destination[:] = tensor.flatten()[start : start + len(destination)], cast.

        destination: 1-D, on any device, of any dtype.

        Raises CheckpointError if the file does not hold the range.
        """
        self.read([(destination, name, start)])

    def read(self, wanted: Iterable[tuple[Tensor, str, int]]) -> None:
        """As read_into, for each (destination, name, start).

        Neighbours in the file come in one read, of at most 64 MB: a fragment may be of a few
        bytes, and thousands of requests to a store take minutes.
        """
        groups = together([self._place(*each) for each in wanted])
        with self._opened() as file:
            for parts in groups:
                if len(parts) == 1:
                    self._read_part(parts[0], file)
                    continue
                start = parts[0].position
                values = torch.empty(parts[-1].end - start, dtype=torch.uint8)
                self._fill(_bytes_of(values), start, parts[0].name, file)
                for part in parts:
                    part.destination.copy_(values[part.position - start : part.end - start].view(part.dtype))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """The descriptor of a local file; not kept: a checkpoint may have thousands of them."""
        if not storage.is_local(self._path):
            yield None
            return
        with open(storage.local_path(self._path), "rb", buffering=0) as file:
            try:
                yield file.fileno()
            finally:  # not before the read: it may also be written meanwhile
                if _identity(os.fstat(file.fileno())) != self._identity:
                    raise _replaced(self._path)

    def _place(self, destination: Tensor, name: str, start: int) -> "Part":
        entry = self.header.get(name)
        if entry is None or start + len(destination) > math.prod(entry["shape"]):
            raise CheckpointError(f"{self._path} does not hold {len(destination):,} values of {name}")
        dtype = _DTYPES[entry["dtype"]]
        position = self._base + entry["data_offsets"][0] + start * dtype.itemsize
        return Part(position, position + len(destination) * dtype.itemsize, name, dtype, destination)

    def _read_part(self, part: "Part", file: int | None) -> None:
        destination = part.destination
        staged = (
            destination.device.type != "cpu"
            or part.dtype != destination.dtype
            or not destination.is_contiguous()
        )
        host = torch.empty(len(destination), dtype=part.dtype) if staged else destination
        self._fill(_bytes_of(host), part.position, part.name, file)
        if staged:
            destination.copy_(host)

    def _fill(self, view: memoryview, position: int, name: str, file: int | None) -> None:
        while len(view):
            count = self._read(view, position, file)
            if count == 0:
                raise CheckpointError(f"{self._path} ends inside {name}")
            view, position = view[count:], position + count

    def dtype(self, name: str) -> torch.dtype:
        kind = self.header.get(name, {}).get("dtype")
        if kind not in _DTYPES:
            raise CheckpointError(f"{self._path} holds no {name} of a dtype that vitscale knows ({kind})")
        return _DTYPES[kind]

    def _read(self, view: memoryview, position: int, file: int | None) -> int:
        if file is not None:
            return os.preadv(file, [view], position)
        data = self._read_bytes(position, position + min(len(view), RANGE_BYTES))
        view[: len(data)] = data
        return len(data)

    def _read_bytes(self, start: int, end: int) -> bytes:
        return storage.read_range(self._path, start, end)


@contextlib.contextmanager
def unreplaced(path: str) -> Iterator[None]:
    """Raises CheckpointError if the block ends with another file of that name than it began."""
    version = storage.versions([path])
    yield
    if storage.versions([path]) != version:
        raise _replaced(path)


def _identity(file: os.stat_result) -> tuple[int, ...]:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def _replaced(path: str) -> CheckpointError:
    return CheckpointError(f"{path} was replaced while it was read; run the same command again")


class Part(NamedTuple):
    """Bytes [position, end) of a file, which are values of a dtype, and where they belong."""

    position: int
    end: int
    name: str
    dtype: torch.dtype
    destination: Tensor


def together(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in the order of the file, in groups that are read at once.

    Gaps in a group are small, it has at most RANGE_BYTES, and its parts are aligned in it.
    """
    groups: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: part.position):
        first = groups[-1][0].position if groups else 0
        if (
            groups
            and 0 <= part.position - groups[-1][-1].end <= _GAP_BYTES
            and part.end - first <= RANGE_BYTES
            and (part.position - first) % part.dtype.itemsize == 0
        ):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object. Raises ValueError if a key comes twice."""
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
        shape, ((start,), (end,)) = sizes(entry["shape"]), [sizes([at]) for at in entry["data_offsets"]]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype and end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError
        ranges.append((start, end))
    before = 0
    for start, end in sorted(ranges):
        if not before <= start <= end:
            raise ValueError
        before = end


def sizes(values: Any) -> tuple[int, ...]:
    """A JSON list as a shape or as offsets. Raises ValueError if it cannot be either."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError
    if math.prod(max(1, value) for value in values) > _MOST:
        raise ValueError
    return tuple(values)


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous 1-D tensor on the CPU, without a copy."""
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] (ndarray is a buffer)


def check_regular(path: str | Path) -> None:
    """Raise CheckpointError for a FIFO, a socket or a device, whose reading might never end."""
    if storage.is_local(str(path)):
        place = Path(storage.local_path(str(path)))
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise CheckpointError(f"{path} is a FIFO, a socket or a device, not a file; copy it again")


def hash_file(path: str | Path) -> FileInfo:
    """Size and checksum of a file as it is now.

    Raises FileNotFoundError if there is none, and CheckpointError for what is no file.
    """
    check_regular(path)
    digest, count = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with storage.open_stream(str(path)) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            count += length
    return FileInfo(num_bytes=count, checksum=digest.hexdigest())
