"""ImageNet-21k and ImageNet-1k as published: a tar archive for each synset (a WordNet id like n01440764),
loose in a folder or together in one outer tar.
"""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vitscale import processes
from vitscale.config import ConfigError
from vitscale.data.pack.config import LeftOutTally, PackConfig
from vitscale.data.pack.imagefolder import is_image_name, list_files
from vitscale.data.pack.listing import FileReferences, Listing, References
from vitscale.data.pack.tar_members import TarPlace, list_members

SYNSET = re.compile(r"n\d{8}")
TRAIN_TAR = "ILSVRC2012_img_train.tar"


def list_imagenet21k(source: str, config: PackConfig) -> Listing:
    """A folder with nXXXXXXXX.tar at any depth, or one tar of them: the releases of autumn 2011 and winter
    2021. The synsets, sorted, are the classes.
    """
    left_out = LeftOutTally()
    places = _synset_tars(source, left_out)
    train = _list_synsets(source, places, config.workers, left_out)
    classes = tuple(place.name for place in places)
    return Listing(splits={"train": train}, classes=classes, left_out=left_out, synsets=True)


def list_imagenet1k(source: str, config: PackConfig) -> Listing:
    """ILSVRC2012_img_train.tar, the folder that holds it, or a folder of its synset tars; "val" where the
    config names its images.
    """
    left_out = LeftOutTally()
    inside = os.path.join(source, TRAIN_TAR)
    source = inside if os.path.isfile(inside) else source
    places = _synset_tars(source, left_out)
    classes = tuple(place.name for place in places)
    splits: dict[str, References] = {"train": _list_synsets(source, places, config.workers, left_out)}
    if config.val_images:
        splits["val"] = _list_validation(config.val_images, config.val_labels, classes, left_out)
    return Listing(splits=splits, classes=classes, left_out=left_out, synsets=True)


def _synset_tars(source: str, left_out: LeftOutTally) -> list[TarPlace]:
    """The archives of the synsets, sorted. Raises ConfigError for none, or for two of one synset."""
    if os.path.isdir(source):
        files = [(path, path, 0) for path, _ in list_files(source)]
    else:
        files = [(source, name, offset) for name, offset, _ in _outer_members(source)]
    places = []
    for path, name, offset in files:
        stem, extension = os.path.splitext(os.path.basename(name))
        if SYNSET.fullmatch(stem) and extension == ".tar":
            places.append(TarPlace(path, offset, stem))
        else:
            left_out.add(f"{name}: not the tar of a synset, like n01440764.tar")
    places.sort(key=lambda place: place.name)
    if not places:
        raise ConfigError(
            f"{source} holds no nXXXXXXXX.tar; name the folder of these archives or the uncompressed tar "
            "of "
            "them (for folders of unpacked images: --format imagefolder)"
        )
    for one, other in itertools.pairwise(places):
        if one.name == other.name:
            raise ConfigError(
                f"{source} holds {one.name}.tar twice ({one.path} and {other.path}); keep one of them"
            )
    return places


def _outer_members(source: str) -> list[tuple[str, int, int]]:
    members = list_members(TarPlace(source, 0, source))
    if members.damage:
        raise ConfigError(
            f"{source} {members.damage}; name a folder or an uncompressed tar (a .tar.gz must be unpacked "
            "first: nothing within it can be reached directly)"
        )
    return members.files


def _list_synsets(
    source: str, places: Sequence[TarPlace], workers: int, left_out: LeftOutTally
) -> FileReferences:
    root = source if os.path.isdir(source) else os.path.dirname(source)
    references = FileReferences(root)
    archives = {path: references.add_archive(os.path.relpath(path, root or ".")) for path in _paths(places)}
    listed = processes.map_in_order(list_members, places, workers)
    for label, (place, members) in enumerate(zip(places, listed, strict=True)):
        if members.damage:
            left_out.add(f"{place.name}.tar in {place.path} {members.damage}")
        for name, offset, size in members.files:
            references.add(name, (label,), size, archives[place.path], offset)
    if not len(references):
        raise ConfigError(f"the archives of {source} hold no images; the first: {left_out.first}")
    return references


def _paths(places: Sequence[TarPlace]) -> list[str]:
    return list(dict.fromkeys(place.path for place in places))


def _list_validation(
    images: str, labels: str, classes: Sequence[str], left_out: LeftOutTally
) -> FileReferences:
    """The images in the order of their names, with the synset of the same line of `labels`."""
    if os.path.isdir(images):
        root, files = images, [(os.path.relpath(path, images), 0, size) for path, size in list_files(images)]
    else:
        root, files = os.path.dirname(images), _outer_members(images)
    files.sort(key=lambda file: os.path.basename(file[0]))
    for name, _, _ in files:
        if not is_image_name(name):
            left_out.add(f"{name} in {images}: not an image by its name")
    files = [file for file in files if is_image_name(file[0])]
    synsets = _read_synsets(labels, classes)
    if len(files) != len(synsets):
        raise ConfigError(
            f"{images} holds {len(files):,} images and {labels} {len(synsets):,} synsets; it must "
            "have one a line, in the order of the file names"
        )
    references = FileReferences(root)
    archive = None if os.path.isdir(images) else references.add_archive(os.path.basename(images))
    label_of = {synset: label for label, synset in enumerate(classes)}
    for (name, offset, size), synset in zip(files, synsets, strict=True):
        references.add(name, (label_of[synset],), size, archive, offset)
    return references


def _read_synsets(path: str, classes: Sequence[str]) -> list[str]:
    try:
        synsets = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--val-labels {path} cannot be read: {error}") from None
    known = set(classes)
    for number, synset in enumerate(synsets, 1):
        if synset not in known:
            raise ConfigError(
                f"{path}: line {number} is {synset!r}, not a synset of the training set; write one "
                f"like {classes[0]} on each line"
            )
    return synsets
