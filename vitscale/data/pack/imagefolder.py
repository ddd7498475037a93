"""Folders of class folders to samples, the images' bytes as they are."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from vitscale import rng
from vitscale.config import ConfigError
from vitscale.data.samples import IMAGE_EXTENSIONS, RawSample

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")


def find_splits(source: Path) -> dict[str, Path]:
    """{split: folder of class folders}: train/, val/ and test/ where they are there, else the whole source as
    "train".
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder; --format imagefolder packs a folder of class folders")
    splits = {name: source / name for name in SPLITS if (source / name).is_dir()}
    return splits or {"train": source}


def class_names(folder: Path) -> list[str]:
    """The class folders, sorted: their positions are the class indices. Raises ConfigError for none."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ConfigError(f"{folder} holds no class folders; it must look like {folder}/CLASS/IMAGE.jpg")
    return names


def read_folder(folder: Path, classes: list[str], split: str, seed: int | None) -> Iterator[RawSample]:
    """The images under the class folders, shuffled by `seed` (None = by class and name).

    Other files are counted and reported, never dropped in silence. Raises ConfigError for a class that is not
    in `classes`.
    """
    unknown = set(class_names(folder)) - set(classes)
    if unknown:
        raise ConfigError(
            f"{folder} has the class {sorted(unknown)[0]!r}, which the training split does not have"
        )
    files, others = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")) if (folder / name).is_dir() else ():
            if path.is_file():
                (files if path.suffix[1:].lower() in IMAGE_EXTENSIONS else others).append((path, label))
    if others:
        logger.warning("%d files are not images and were left out, the first: %s", len(others), others[0][0])
    if not files:
        raise ConfigError(f"{folder} holds no image: .{', .'.join(IMAGE_EXTENSIONS)} are read")
    order = (
        range(len(files)) if seed is None else rng.permutation(len(files), seed, "pack", SPLITS.index(split))
    )
    for number, position in enumerate(order):
        path, label = files[position]
        # The number keeps keys apart where classes share file names; dots would end the key.
        key = f"{split}_{number:08d}_{path.stem.replace('.', '_')}"
        yield RawSample(key, path.read_bytes(), path.suffix[1:].lower(), (label,))


def write_class_names(folder: Path, classes: list[str]) -> None:
    """classes.json beside the shards: the name of each class index."""
    (folder / "classes.json").write_text(
        json.dumps(classes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
