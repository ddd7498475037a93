"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html, the
python and the binary versions, as archives or unpacked.
"""

import dataclasses
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vitscale.config import ConfigError
from vitscale.data.pack.array_pickle import PickleRefused, read_array_pickle
from vitscale.data.pack.config import LeftOutTally, PackConfig
from vitscale.data.pack.listing import Listing, PixelReferences

SIDE = 32
PLANES = 3 * SIDE * SIDE


@dataclasses.dataclass(frozen=True)
class Version:
    """How a published version is laid out: its files by split, and where the labels and class names are.

    python: the files are pickles, and `label` is a key; else records of 3072 bytes after `label_bytes`,
    and
    `label` is a position therein.
    """

    python: bool
    files: Mapping[str, Sequence[str]]
    names_file: str
    label: str | int
    names_key: str
    label_bytes: int = 0


def cifar10_versions() -> list[Version]:
    def files(ending: str) -> dict[str, list[str]]:
        numbers = range(1, 6)
        return {
            "train": [f"data_batch_{number}{ending}" for number in numbers],
            "test": [f"test_batch{ending}"],
        }

    return [
        Version(True, files(""), "batches.meta", "labels", "label_names"),
        Version(False, files(".bin"), "batches.meta.txt", 0, "", label_bytes=1),
    ]


def cifar100_versions(labels: str) -> list[Version]:
    """labels: "fine" (100 classes) or "coarse" (20)."""
    names, position = f"{labels}_label_names", {"coarse": 0, "fine": 1}[labels]
    return [
        Version(True, {"train": ["train"], "test": ["test"]}, "meta", f"{labels}_labels", names),
        Version(
            False, {"train": ["train.bin"], "test": ["test.bin"]}, f"{names}.txt", position, "", label_bytes=2
        ),
    ]


def list_cifar10(source: str, config: PackConfig) -> Listing:
    """cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or the folder of either."""
    return _list(source, cifar10_versions(), "cifar10", 10)


def list_cifar100(source: str, config: PackConfig) -> Listing:
    """cifar-100-python.tar.gz, cifar-100-binary.tar.gz, or the folder of either, with the labels that the
    config says.
    """
    return _list(
        source, cifar100_versions(config.labels), "cifar100", {"fine": 100, "coarse": 20}[config.labels]
    )


def _list(source: str, versions: Sequence[Version], name: str, num_classes: int) -> Listing:
    wanted = {file for version in versions for file in (version.names_file, *_all_files(version))}
    files = _read_files(Path(source), wanted)
    found = [version for version in versions if all(file in files for file in _all_files(version))]
    if not found:
        missing = [next(file for file in _all_files(v) if file not in files) for v in versions]
        raise ConfigError(
            f"{source} holds neither {' nor '.join(missing)}; --format {name} reads the python or binary "
            "archive as it is published, or its folder"
        )
    version, splits = found[0], {}
    for split, names in version.files.items():
        batches = [_read_batch(source, file, files[file], version, num_classes) for file in names]
        planes, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        splits[split] = PixelReferences(planes, labels, SIDE, f"{name}_{split}")
    return Listing(
        splits=splits, classes=_class_names(source, files, version, num_classes), left_out=LeftOutTally()
    )


def _all_files(version: Version) -> list[str]:
    return [file for files in version.files.values() for file in files]


def _read_files(source: Path, wanted: set[str]) -> dict[str, bytes]:
    """The contents of the wanted files by name, from a folder or a tar archive."""
    try:
        if source.is_dir():
            return {path.name: path.read_bytes() for path in sorted(source.rglob("*")) if path.name in wanted}
        found = {}
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                file = archive.extractfile(member) if PurePosixPath(member.name).name in wanted else None
                if file:
                    found[PurePosixPath(member.name).name] = file.read()
        return found
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(
            f"{source} cannot be read as a folder or tar archive ({error}); is it there, and whole?"
        ) from None


def _read_batch(
    source: str, name: str, data: bytes, version: Version, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """planes uint8 [n, 3072], labels int64 [n]."""
    if version.python:
        values = _read_pickle(source, name, data)
        planes, labels = values.get("data"), values.get(str(version.label))
        if not isinstance(planes, np.ndarray) or not _are_integers(labels):
            raise ConfigError(f"{name} in {source} holds no 'data' and {version.label!r}; is it CIFAR's?")
        labels = np.array(labels, np.int64)
    else:
        width = version.label_bytes + PLANES
        if not data or len(data) % width:
            raise ConfigError(
                f"{name} in {source} has {len(data):,} bytes, not a multiple of a record's {width:,}"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, width)
        planes, labels = records[:, version.label_bytes :], records[:, int(version.label)].astype(np.int64)
    if planes.shape != (len(labels), PLANES):
        raise ConfigError(f"{name} in {source} has {planes.shape} pixels for {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ConfigError(f"{name} in {source} has the label {labels.max()}, beyond {num_classes} classes")
    return planes, labels


def _class_names(
    source: str, files: Mapping[str, bytes], version: Version, num_classes: int
) -> tuple[str, ...]:
    """() where the archive does not bring them."""
    if version.names_file not in files:
        return ()
    data = files[version.names_file]
    if version.python:
        names = _read_pickle(source, version.names_file, data).get(version.names_key, [])
    else:
        names = data.decode("utf-8", "replace").split()
    if len(names) != num_classes:
        raise ConfigError(f"{version.names_file} in {source} names {len(names)} classes, not {num_classes}")
    return tuple(name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names)


def _are_integers(labels: object) -> bool:
    return isinstance(labels, list) and all(type(label) is int for label in labels)


def _read_pickle(source: str, name: str, data: bytes) -> dict:
    try:
        values = read_array_pickle(data)
    except PickleRefused as refused:
        raise ConfigError(
            f"{name} in {source} is not CIFAR's: {refused}; download the archive anew"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} in {source} is not CIFAR's: it holds no dict; download the archive anew")
    return values
