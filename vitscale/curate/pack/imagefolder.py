"""Lists folders of class folders by the names of their images; nothing is opened."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitscale.curate.pack.config import SPLITS, Omissions, PackConfig
from vitscale.curate.pack.listing import FileReferences, Listing
from vitscale.data.samples import IMAGE_EXTENSIONS
from vitscale.errors import DataError

VAL_NAMES = ("val", "validation", "valid")  # the first that is there, beside train
SPLIT_WORDS = {*SPLITS, *VAL_NAMES, "training", "testing"}


def list_imagefolder(source: str, config: PackConfig) -> Listing:
    """source/CLASS/**/IMAGE.jpg, or source/{train,val,test}/CLASS/**/IMAGE.jpg.

    The class folders of the training split, sorted, are the classes. Raises DataError for a
    class that only another split has, for a split without images, for class folders beside
    splits (one of the splits is then a class of that name), and for splits by other names,
    which would be taken for classes.
    """
    folders = find_splits(Path(source))
    _refuse_classes_beside(Path(source), folders)
    classes = class_names(next(iter(folders.values())))
    omissions = Omissions()
    splits = {split: _list_split(source, folder, classes, omissions) for split, folder in folders.items()}
    _add_unexpected(Path(source), folders, omissions)
    return Listing(splits=dict(splits), classes=tuple(classes), omissions=omissions)


def find_splits(source: Path) -> dict[str, Path]:
    """The folders of train, val and test that exist, or else the source as "train".

    Raises DataError as list_imagefolder does for splits by other names.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; --format imagefolder packs a folder of class folders")
    val_names = VAL_NAMES if (source / "train").is_dir() else ("val",)
    named = {"train": ("train",), "val": val_names, "test": ("test",)}
    found = {
        split: [source / name for name in names if (source / name).is_dir()] for split, names in named.items()
    }
    splits = {split: folders[0] for split, folders in found.items() if folders}
    if "train" not in splits:
        _refuse_misnamed_splits(source)
    return splits or {"train": source}


def _refuse_misnamed_splits(source: Path) -> None:
    """Raise DataError if all folders are named like splits, and one of them holds folders."""
    names = sorted(path.name for path in source.glob("[!.]*") if path.is_dir())
    if set(names) <= set(SPLITS) or not {name.lower() for name in names} <= SPLIT_WORDS:
        return
    if any(path.is_dir() for name in names for path in (source / name).glob("[!.]*")):
        raise DataError(
            f"{source} holds {', '.join(f'{name}/' for name in names)}, which look like splits with class "
            "folders; rename them to train/, val/ and test/, or, if they are classes, to other names"
        )


def class_names(folder: Path) -> list[str]:
    """The class folders, sorted: their positions are the class indices.

    Raises DataError if there are none, and for a name that is not text: classes.json could not
    hold it.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if not name.isprintable():  # a byte that is not UTF-8 is a lone surrogate here
            raise DataError(
                f"{folder}: the name of the class folder {os.fsencode(name)!r} is not UTF-8; rename it"
            )
    if not names:
        raise DataError(f"{folder} holds no class folders; it must look like {folder}/CLASS/IMAGE.jpg")
    return names


def list_files(folder: str) -> Iterator[tuple[str, int]]:
    """Path and number of bytes of every file below a folder, in the order of the names.

    Skips hidden folders, and pipes and devices, which would block. Follows links to folders
    unless they lead back up.
    """
    with os.scandir(folder) as entries:
        by_name = sorted(entries, key=lambda entry: entry.name)
    for entry in by_name:
        if entry.is_dir():
            target, parent = os.path.realpath(entry.path) + os.sep, os.path.realpath(folder) + os.sep
            if not entry.name.startswith(".") and not parent.startswith(target):
                yield from list_files(entry.path)
        elif entry.is_file() or entry.is_symlink():
            yield entry.path, _size(entry)


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _list_split(source: str, folder: Path, classes: list[str], omissions: Omissions) -> FileReferences:
    present = class_names(folder)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(f"{folder} has the class {unknown[0]!r}, which the training split does not have")
    references = FileReferences(source)
    for label, name in enumerate(classes):
        for path, size in list_files(str(folder / name)) if name in present else ():
            if is_image_name(path):
                references.add(os.path.relpath(path, source), (label,), size)
            else:
                omissions.add(f"{path}: not an image by its name; .{', .'.join(IMAGE_EXTENSIONS)} are read")
    if not len(references):
        raise DataError(f"{folder} holds no image: .{', .'.join(IMAGE_EXTENSIONS)} are read")
    return references


def _refuse_classes_beside(source: Path, folders: Mapping[str, Path]) -> None:
    if source in folders.values():
        return
    others = sorted(set(filter(Path.is_dir, source.glob("[!.]*"))) - set(folders.values()))
    classes = [path.name for path in others if any(map(is_image_name, os.listdir(path)))]
    if classes:
        raise DataError(
            f"{source} holds folders of images ({', '.join(classes[:3])}) beside the splits "
            f"{', '.join(folders)}; if one of these is a class, move all classes into {source / 'train'}, "
            "else move the other folders away"
        )


def _add_unexpected(source: Path, folders: Mapping[str, Path], omissions: Omissions) -> None:
    """Report what is beside the splits or the class folders: validation/, for example."""
    for folder in dict.fromkeys([source, *folders.values()]):
        for path in sorted(folder.iterdir()):
            expected = path.is_dir() if folder in folders.values() else path in folders.values()
            if not expected and not path.name.startswith("."):
                omissions.add(f"{path}: neither a split ({', '.join(SPLITS)}) nor in a class folder")


def _size(entry: os.DirEntry) -> int:
    """0 for a broken link or a file that vanished: it is reported when it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return 0
