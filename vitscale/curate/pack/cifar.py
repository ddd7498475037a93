"""CIFAR-10 and CIFAR-100 from their binary archives (PAGE), packed or unpacked.

The python archives on the same page hold pickles, which are programs, and are refused: an
unpickler with a restricted find_class is not safe. Even if it finds no class at all, it crashes
on a deeply nested tuple as a dict key, and fills gigabytes for a memo index that takes 5 bytes.
If it finds numpy's array and dtype, a forged dtype crashes it as well.
"""

import dataclasses
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int64, UInt8

from vitscale.curate.pack.config import Omissions, PackConfig
from vitscale.curate.pack.listing import Listing, PixelReferences
from vitscale.errors import DataError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE  # the planes R, G, B


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryFormat:
    """A binary archive: its files are rows of `num_label_bytes` labels and PIXEL_BYTES pixels.

    label_byte: which of the label bytes is taken.
    files: by split. The python archive has files of the same names without ".bin".
    names_file: the class names, one per line.
    """

    name: str
    archive: str
    files: Mapping[str, Sequence[str]]
    names_file: str
    num_label_bytes: int
    label_byte: int
    num_classes: int

    def all_files(self) -> list[str]:
        return [file for files in self.files.values() for file in files]


CIFAR10 = BinaryFormat(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    files={"train": [f"data_batch_{batch}.bin" for batch in range(1, 6)], "test": ["test_batch.bin"]},
    names_file="batches.meta.txt",
    num_label_bytes=1,
    label_byte=0,
    num_classes=10,
)
CIFAR100_COARSE = BinaryFormat(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    files={"train": ["train.bin"], "test": ["test.bin"]},
    names_file="coarse_label_names.txt",
    num_label_bytes=2,
    label_byte=0,
    num_classes=20,
)
CIFAR100_FINE = dataclasses.replace(
    CIFAR100_COARSE, names_file="fine_label_names.txt", label_byte=1, num_classes=100
)


def list_cifar10(source: str, config: PackConfig) -> Listing:
    """cifar-10-binary.tar.gz, or its folder."""
    return _list(source, CIFAR10)


def list_cifar100(source: str, config: PackConfig) -> Listing:
    """cifar-100-binary.tar.gz, or its folder, with the labels that the config chooses."""
    return _list(source, {"fine": CIFAR100_FINE, "coarse": CIFAR100_COARSE}[config.labels])


def _list(source: str, binary: BinaryFormat) -> Listing:
    contents = _read_files(source, binary)
    splits = {}
    for split, files in binary.files.items():
        batches = [_read_batch(source, file, contents[file], binary) for file in files]
        planes, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        splits[split] = PixelReferences(planes, labels, SIDE, f"{binary.name}_{split}")
    classes = _class_names(source, contents, binary)
    return Listing(splits=splits, classes=classes, omissions=Omissions())


def _read_files(source: str, binary: BinaryFormat) -> dict[str, bytes]:
    """The contents of the format's files by name; all but the class names are there."""
    required = binary.all_files()
    python_files = {file.removesuffix(".bin") for file in required}
    try:
        contents, others = _find_files(Path(source), [*required, binary.names_file])
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{source} cannot be read as a folder or tar archive ({error}); "
            f"check the path, or download {binary.archive} again"
        ) from None
    missing = [file for file in required if file not in contents]
    if missing and python_files <= others:
        raise DataError(
            f"{source} is the python version, pickles that could run any code and are not read; "
            f"download {binary.archive} from {PAGE}, which holds the same images"
        )
    if missing:
        raise DataError(
            f"{source} holds no {missing[0]}; --format {binary.name} reads {binary.archive} "
            f"from {PAGE}, or the folder that it unpacks to"
        )
    return contents


def _find_files(source: Path, wanted: Collection[str]) -> tuple[dict[str, bytes], set[str]]:
    """The contents of the wanted files in a folder or tar archive; the names of the others."""
    contents, others = {}, set()
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.name in wanted:
                contents[path.name] = path.read_bytes()
            elif path.is_file():
                others.add(path.name)
        return contents, others
    with tarfile.open(source, "r:*") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            file = archive.extractfile(member) if name in wanted else None
            if file:
                contents[name] = file.read()
            elif member.isfile():
                others.add(name)
    return contents, others


def _read_batch(
    source: str, file: str, data: bytes, binary: BinaryFormat
) -> tuple[UInt8[np.ndarray, "n 3072"], Int64[np.ndarray, " n"]]:
    """The planes and the labels of one file."""
    row_bytes = binary.num_label_bytes + PIXEL_BYTES
    if not data or len(data) % row_bytes:
        raise DataError(
            f"{file} in {source} has {len(data):,} bytes, not a multiple of {row_bytes:,}, the size of an "
            f"image and its labels; download {binary.archive} again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
    labels = rows[:, binary.label_byte].astype(np.int64)
    if labels.max() >= binary.num_classes:
        raise DataError(
            f"{file} in {source} has the label {labels.max()}, but {binary.num_classes} classes; "
            f"download {binary.archive} again"
        )
    return rows[:, binary.num_label_bytes :], labels


def _class_names(source: str, contents: Mapping[str, bytes], binary: BinaryFormat) -> tuple[str, ...]:
    """() where the archive has none."""
    if binary.names_file not in contents:
        return ()
    names = contents[binary.names_file].decode("utf-8", "replace").split()
    if len(names) != binary.num_classes:
        raise DataError(
            f"{binary.names_file} in {source} names {len(names)} classes, not {binary.num_classes}; "
            f"download {binary.archive} again"
        )
    return tuple(names)
