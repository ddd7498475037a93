"""What a source holds, as light references to its images: names, places and labels, no content.

FileReferences takes 40 bytes a sample and its name: 0.9 GB for the 14 million images of
ImageNet-21k.
"""

import dataclasses
import hashlib
import io
import os
from array import array
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vitscale.curate.pack.config import Omission, Omissions, UnreadableFile
from vitscale.data.tar import MAX_MEMBER_BYTES
from vitscale.stores import storage

WHOLE = -1  # as a size: whatever the file has when it is read


@runtime_checkable
class Reference(Protocol):
    """One image of a source.

    name: becomes part of its key.
    where: names it in messages.
    read: returns its bytes, or raises Omission.
    """

    @property
    def name(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def labels(self) -> tuple[int, ...]: ...
    def read(self) -> bytes: ...


@runtime_checkable
class References(Protocol):
    """The samples of one split in the order of the source."""

    def __len__(self) -> int: ...

    def take(self, positions: np.ndarray) -> list[Reference]:
        """Those at `positions` [n], self-contained: a task carries them to another process."""
        ...

    def digest(self) -> bytes:
        """Changes with the samples, their order, their sizes and their labels."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The splits of a source, its class names by index (() if unknown), and its omissions.

    synsets: whether the class names are WordNet ids, which also get a file of their own.
    edition: which edition of the data set this is, in words; "" if it has none.
    passed_over: by extension, how many files of existing shards are neither image nor label.
    """

    splits: dict[str, References]
    classes: tuple[str, ...]
    omissions: Omissions
    synsets: bool = False
    edition: str = ""
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class FileReference:
    """The bytes [offset, offset + size) of a file, or of an archive with a member `name`."""

    path: str
    offset: int
    size: int
    name: str
    labels: tuple[int, ...]

    @property
    def where(self) -> str:
        return f"{self.name} in {self.path}" if self.offset else self.path

    def read(self) -> bytes:
        if self.size > MAX_MEMBER_BYTES:
            raise Omission(f"{self.where}: {self.size:,} bytes; an image may have {MAX_MEMBER_BYTES:,}")
        try:
            if self.size == WHOLE:
                return storage.read_bytes(self.path)
            # One byte more of a whole file shows whether it has grown.
            end = self.offset + self.size if self.offset else self.size + 1
            data = storage.read_range(self.path, self.offset, end)
        except OSError as error:
            raise UnreadableFile(f"{self.where}: cannot be read ({error.strerror or error})") from None
        if len(data) != self.size:
            raise Omission(
                f"{self.where}: its size is no longer the {self.size:,} bytes that were listed; pack again, "
                "with --overwrite"
            )
        return data


class FileReferences:
    """Samples in files, or in ranges of archives. Columns, not objects: there may be millions.

    Names and labels vary in length: one column holds the values of all samples, another where
    those of each sample end. For the labels (3, 17), (5,), (9, 2):

        _labels      3 17 5 9 2
        _label_ends  2 3 5
    """

    def __init__(self, root: str) -> None:
        """root: the folder that names and archives are relative to ("" if they are paths)."""
        self._root = root
        self._archives: list[str] = []
        self._archive_ids, self._offsets, self._sizes = array("i"), array("q"), array("q")
        self._names, self._name_ends = bytearray(), array("q")
        self._labels, self._label_ends = array("i"), array("q")

    def add_archive(self, path: str) -> int:
        """Register an archive; return its id for `add`."""
        self._archives.append(path)
        return len(self._archives) - 1

    def add(
        self, name: str, labels: Iterable[int], size: int, archive: int | None = None, offset: int = 0
    ) -> None:
        """Add the member of an archive at byte `offset`, or (None) the file `name` itself."""
        self._archive_ids.append(-1 if archive is None else archive)
        self._offsets.append(offset)
        self._sizes.append(size)
        self._names += os.fsencode(name)
        self._name_ends.append(len(self._names))
        self._labels.extend(labels)
        self._label_ends.append(len(self._labels))

    def __len__(self) -> int:
        return len(self._sizes)

    def take(self, positions: np.ndarray) -> list[Reference]:
        return [self._reference(int(position)) for position in positions]

    def digest(self) -> bytes:
        digest = hashlib.sha256("\0".join(self._archives).encode(errors="surrogateescape"))
        for column in (
            self._archive_ids,
            self._offsets,
            self._sizes,
            self._names,
            self._name_ends,
            self._labels,
            self._label_ends,
        ):
            digest.update(column)
        return digest.digest()

    def _reference(self, position: int) -> FileReference:
        name = os.fsdecode(bytes(self._names[_range(self._name_ends, position)]))
        archive = self._archive_ids[position]
        path = name if archive < 0 else self._archives[archive]
        return FileReference(
            os.path.join(self._root, path),
            self._offsets[position],
            self._sizes[position],
            name,
            tuple(self._labels[_range(self._label_ends, position)]),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PixelReference:
    """An image given as planes R, G, B of side x side bytes; read as a lossless PNG."""

    planes: bytes
    side: int
    name: str
    labels: tuple[int, ...]

    @property
    def where(self) -> str:
        return self.name

    def read(self) -> bytes:
        pixels = np.frombuffer(self.planes, np.uint8).reshape(3, self.side, self.side).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class PixelReferences:
    """Samples as pixels in memory: planes uint8 [n, 3 * side * side], labels int64 [n]."""

    planes: np.ndarray
    labels: np.ndarray
    side: int
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> list[Reference]:
        return [self._reference(int(position)) for position in positions]

    def digest(self) -> bytes:
        digest = hashlib.sha256(np.ascontiguousarray(self.planes).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.digest()

    def _reference(self, position: int) -> PixelReference:
        labels = (int(self.labels[position]),)
        return PixelReference(self.planes[position].tobytes(), self.side, f"{self.name}_{position}", labels)


def _range(ends: array, position: int) -> slice:
    """Where the values of a sample are, in a column of varying lengths."""
    return slice(ends[position - 1] if position else 0, ends[position])
