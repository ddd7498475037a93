"""Folders of class folders: the images' names are listed, nothing is opened."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitscale.config import ConfigError
from vitscale.data.pack.config import SPLITS, LeftOutTally, PackConfig
from vitscale.data.pack.listing import FileReferences, Listing
from vitscale.data.samples import IMAGE_EXTENSIONS


def list_imagefolder(source: str, config: PackConfig) -> Listing:
    """source/CLASS/IMAGE.jpg, or source/{train,val,test}/CLASS/IMAGE.jpg; deeper folders belong to the class.

    The training split's class folders, sorted, are the classes. Raises ConfigError for a class that it does
    not have, and for a split without images.
    """
    folders = find_splits(Path(source))
    classes = class_names(next(iter(folders.values())))
    left_out = LeftOutTally()
    splits = {
        split: _list_split(source, folder, split, classes, left_out) for split, folder in folders.items()
    }
    _tally_strangers(Path(source), folders, left_out)
    return Listing(splits=dict(splits), classes=tuple(classes), left_out=left_out)


def find_splits(source: Path) -> dict[str, Path]:
    """{split: folder of class folders}: train/, val/ and test/ where they are there, else the whole source as
    "train".
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder; --format imagefolder packs a folder of class folders")
    splits = {name: source / name for name in SPLITS if (source / name).is_dir()}
    return splits or {"train": source}


def class_names(folder: Path) -> list[str]:
    """The class folders, sorted: their positions are the class indices. Raises ConfigError for none, and
    for a name that is no text, which classes.json could not carry.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if not name.isprintable():  # a byte that is not UTF-8 is a lone surrogate here
            raise ConfigError(
                f"{folder}: the class folder {os.fsencode(name)!r} has no name in UTF-8; rename it"
            )
    if not names:
        raise ConfigError(f"{folder} holds no class folders; it must look like {folder}/CLASS/IMAGE.jpg")
    return names


def list_files(folder: str) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every file below a folder, in the order of the names; hidden folders are passed over,
    and pipes and devices, which would be waited for.

    Links to folders are followed where they do not lead back up.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            target, here = os.path.realpath(entry.path) + os.sep, os.path.realpath(folder) + os.sep
            if not entry.name.startswith(".") and not here.startswith(target):
                yield from list_files(entry.path)
        elif entry.is_file() or entry.is_symlink():
            yield entry.path, _size(entry)


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _list_split(
    source: str, folder: Path, split: str, classes: list[str], left_out: LeftOutTally
) -> FileReferences:
    present = class_names(folder)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise ConfigError(f"{folder} has the class {unknown[0]!r}, which the training split does not have")
    references = FileReferences(source)
    for label, name in enumerate(classes):
        for path, size in list_files(str(folder / name)) if name in present else ():
            if is_image_name(path):
                references.add(os.path.relpath(path, source), (label,), size)
            else:
                left_out.add(f"{path}: not an image by its name; .{', .'.join(IMAGE_EXTENSIONS)} are read")
    if not len(references):
        raise ConfigError(f"{folder} holds no image: .{', .'.join(IMAGE_EXTENSIONS)} are read")
    return references


def _tally_strangers(source: Path, folders: Mapping[str, Path], left_out: LeftOutTally) -> None:
    """Name what stands beside the splits and the class folders: train/ and validation/, say."""
    for folder in dict.fromkeys([source, *folders.values()]):
        for path in sorted(folder.iterdir()):
            known = path in folders.values() if folder not in folders.values() else path.is_dir()
            if not known and not path.name.startswith("."):
                left_out.add(f"{path}: neither a split ({', '.join(SPLITS)}) nor in a class folder")


def _size(entry: os.DirEntry) -> int:
    """0 for what vanished or is a broken link: it is reported when it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return 0
