"""From the TFDS splits of a data set to the splits of VTAB-1k: what all converters share."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitscale.curate.pack.config import Omission, Omissions
from vitscale.curate.pack.listing import Listing, Reference, References
from vitscale.curate.pack.vtab.archives import Files, StoredFile
from vitscale.data.samples import image_kind
from vitscale.errors import DataError
from vitscale.vtab.membership import Key, key_bytes, members
from vitscale.vtab.tasks import TEST, TRAIN800, TRAIN800VAL200, VAL200, Task

Images = Callable[[list[int]], Sequence[StoredFile]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """One TFDS split, in any order.

    keys    as TFDS has them; their type does not matter, see key_bytes
    labels  class indices from 0 on, one of each image
    images  gives the files of some rows; it is asked once for every split of VTAB-1k, so that
            only those images need be found or read (held, named)
    """

    keys: Sequence[Key]
    labels: Sequence[int]
    images: Images


def held(files: Sequence[StoredFile]) -> Images:
    """Examples.images of files that are all at hand."""
    return lambda rows: [files[row] for row in rows]


def named(
    files: Files, names: Sequence[str], listed_in: str, convert: Callable[[bytes], bytes] | None = None
) -> Images:
    """Examples.images of files by name, which are looked up when they are asked for.

    convert: what TFDS does to each of them.
    """

    def images(rows: list[int]) -> list[StoredFile]:
        taken = files.take([names[row] for row in rows], listed_in)
        return [ConvertedImage(file, convert) for file in taken] if convert else taken

    return images


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayImage:
    """Pixels uint8 [H W 3], or grey ones [H W] that are tiled; read as a lossless PNG."""

    pixels: np.ndarray
    where: str

    @property
    def size(self) -> int:
        return self.pixels.size

    def read(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.pixels)).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True, slots=True)
class ConvertedImage:
    """A file that TFDS does not keep as it is. `convert` raises DataError for a bad image."""

    file: StoredFile
    convert: Callable[[bytes], bytes]

    @property
    def where(self) -> str:
        return self.file.where

    @property
    def size(self) -> int:
        return self.file.size

    def read(self) -> bytes:
        content = self.file.read()
        try:
            return self.convert(content)
        except DataError as error:
            raise DataError(f"{self.where}: {error}; restore it") from None


@dataclasses.dataclass(frozen=True, slots=True)
class ExampleReference:
    """One image; unlike those of other formats, it is never left out of its split."""

    file: StoredFile
    name: str
    labels: tuple[int, ...]

    @property
    def where(self) -> str:
        return self.file.where

    def read(self) -> bytes:
        try:
            image = self.file.read()
        except Omission as omission:
            raise DataError(f"{omission}; restore it: a published split is whole or nothing") from None
        if not image_kind(image):
            raise DataError(f"{self.where}: is not a JPEG, PNG or WebP image; restore it")
        return image


@dataclasses.dataclass(frozen=True)
class ExampleReferences:
    """The images of one split of VTAB-1k, in stored order."""

    examples: Sequence[ExampleReference]

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, positions: np.ndarray) -> list[Reference]:
        return [self.examples[int(position)] for position in positions]

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.name}\0{example.labels}\0{example.file.size}\0".encode())
            if isinstance(example.file, ArrayImage):
                digest.update(np.ascontiguousarray(example.file.pixels).data)
        return digest.digest()


def make_listing(
    task: Task,
    source: str,
    splits: Mapping[str, Examples],
    classes: Sequence[str] = (),
    deviations: Sequence[str] = (),
) -> Listing:
    """The splits train800, val200, train800val200 and test of a task.

    splits: the examples of every TFDS split in task.sizes.
    classes: the names of the classes, if the data set has any.
    deviations: why the split is not the published one, beside the sizes.

    Raises DataError for a label that the task does not have, and for keys that are not unique.
    """
    _check_labels(task, source, splits)
    try:
        positions = members(task, {split: examples.keys for split, examples in splits.items()})
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    chosen = {name: _references(splits[split], rows) for name, (split, rows) in positions.items()}
    ordered: dict[str, References] = {
        name: ExampleReferences(examples)
        for name, examples in (
            (TRAIN800, chosen[TRAIN800]),
            (VAL200, chosen[VAL200]),
            (TRAIN800VAL200, [*chosen[TRAIN800], *chosen[VAL200]]),
            (TEST, chosen[TEST]),
        )
    }
    counts = {name: len(references) for name, references in ordered.items()}
    edition = describe(task, {s: len(e.keys) for s, e in splits.items()}, counts, classes, deviations)
    return Listing(splits=ordered, classes=tuple(classes), omissions=Omissions(), edition=edition)


def describe(
    task: Task,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    classes: Sequence[str],
    deviations: Sequence[str],
) -> str:
    """Whether this is the published split; if not, why."""
    why = [
        f"{split} has {sizes[split]:,} images instead of {published:,}"
        for split, published in task.sizes.items()
        if sizes[split] != published
    ]
    if classes and len(classes) != task.num_classes:
        why.append(f"there are {len(classes)} classes instead of {task.num_classes}")
    why += deviations
    held = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if why:
        return f"vtab/{task.name}: not the published split: {'; '.join(why)} ({held})"
    return f"vtab/{task.name}: the published split ({held})"


def array_images(
    arrays: Sequence[np.ndarray] | UInt8[np.ndarray, "n *S"], rows: Sequence[int], where: str
) -> list[ArrayImage]:
    """Images of arrays in memory; `rows` are their numbers in the data set."""
    return [ArrayImage(pixels, f"image {row} of {where}") for pixels, row in zip(arrays, rows, strict=True)]


def all_references(examples: Examples) -> list[ExampleReference]:
    """The images of a whole TFDS split, in its order."""
    return _references(examples, list(range(len(examples.keys))))


def _references(examples: Examples, rows: list[int]) -> list[ExampleReference]:
    files = examples.images(rows)
    return [
        ExampleReference(
            file, key_bytes(examples.keys[row]).decode(errors="replace"), (examples.labels[row],)
        )
        for row, file in zip(rows, files, strict=True)
    ]


def _check_labels(task: Task, source: str, splits: Mapping[str, Examples]) -> None:
    for split, examples in splits.items():
        if len(examples.keys) != len(examples.labels):
            raise DataError(
                f"{source} has {len(examples.keys):,} images and {len(examples.labels):,} labels in {split}; "
                "download it again"
            )
        for key, label in zip(examples.keys, examples.labels, strict=True):
            if not 0 <= label < task.num_classes:
                name = key_bytes(key).decode(errors="replace")
                raise DataError(
                    f"{source}: {name} of {split} has the label {label}, but vtab/{task.name} has the "
                    f"labels 0 to {task.num_classes - 1}; download it again"
                )
