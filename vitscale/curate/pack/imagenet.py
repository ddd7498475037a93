"""Lists ImageNet-21k and ImageNet-1k as published: one tar archive for each synset.

The archives are named by WordNet ids like n01440764, loose in a folder or inside one outer tar.
"""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vitscale.curate.pack.config import Omissions, PackConfig
from vitscale.curate.pack.imagefolder import is_image_name, list_files
from vitscale.curate.pack.listing import WHOLE, FileReferences, Listing, References
from vitscale.curate.pack.tar_members import TarPlace, list_members
from vitscale.errors import DataError
from vitscale.system import processes

SYNSET = re.compile(r"n\d{8}")
TRAIN_TAR = "ILSVRC2012_img_train.tar"
# ImageNet-21k by its number of synsets. The released heads have two more than fall11, which has
# no images of them. In all of them, label i is the i-th WordNet id in rising order.
EDITIONS = {21_841: "fall11", 19_167: "winter21", 21_843: "the released ViT heads"}
HEAD_CLASSES, HEAD_ONLY = 21_843, ("n03931044", "n09859684")


def list_imagenet21k(source: str, config: PackConfig) -> Listing:
    """A folder with nXXXXXXXX.tar at any depth, or one tar of them.

    These are the releases of autumn 2011 and winter 2021. The synsets, sorted, are the classes.
    """
    omissions = Omissions()
    places = _synset_tars(source, omissions)
    train = _list_synsets(source, places, config.workers, omissions)
    classes = tuple(place.name for place in places)
    return Listing(
        splits={"train": train},
        classes=classes,
        omissions=omissions,
        synsets=True,
        edition=describe_edition(classes),
    )


def describe_edition(synsets: Sequence[str]) -> str:
    """Which edition of ImageNet-21k it is, and how its labels fit the released heads."""
    known = ", ".join(f"{name} has {count:,}" for count, name in EDITIONS.items())
    edition = EDITIONS.get(len(synsets), f"no known edition ({known})")
    order = "label i is the i-th WordNet id in rising order, as in classes.json"
    if len(synsets) == HEAD_CLASSES:
        return f"{len(synsets):,} synsets: those of {edition}; {order}"
    extra = f"with {' and '.join(HEAD_ONLY)} besides, " if EDITIONS.get(len(synsets)) == "fall11" else ""
    return (
        f"{len(synsets):,} synsets: {edition}; {order}. The released ViT heads have {HEAD_CLASSES:,} "
        f"classes in that order, {extra}so their labels are others: map them with data.label_map"
    )


def list_imagenet1k(source: str, config: PackConfig) -> Listing:
    """ILSVRC2012_img_train.tar, the folder that holds it, or a folder of its synset tars.

    The split "val" is listed too, if the config names its images.
    """
    omissions = Omissions()
    train_tar = os.path.join(source, TRAIN_TAR)
    source = train_tar if os.path.isfile(train_tar) else source
    places = _synset_tars(source, omissions)
    classes = tuple(place.name for place in places)
    splits: dict[str, References] = {"train": _list_synsets(source, places, config.workers, omissions)}
    if config.val_images:
        splits["val"] = _list_validation(config.val_images, config.val_labels, classes, omissions)
    return Listing(splits=splits, classes=classes, omissions=omissions, synsets=True)


def _synset_tars(source: str, omissions: Omissions) -> list[TarPlace]:
    """The archives of the synsets, sorted. Raises DataError for none, or two of one synset."""
    if os.path.isdir(source):
        files = [(path, path, 0, WHOLE) for path, _ in list_files(source)]
    else:
        files = [(source, *member) for member in _outer_members(source, omissions)]
    places = []
    for path, name, offset, size in files:
        stem, extension = os.path.splitext(os.path.basename(name))
        if SYNSET.fullmatch(stem) and extension == ".tar":
            places.append(TarPlace(path, offset, stem, size))
        else:
            omissions.add(f"{name}: not the tar of a synset, like n01440764.tar")
    places.sort(key=lambda place: place.name)
    if not places:
        raise DataError(
            f"{source} holds no nXXXXXXXX.tar; name the folder of these archives or the uncompressed "
            "tar of them (for folders of unpacked images: --format imagefolder)"
        )
    for place, following in itertools.pairwise(places):
        if place.name == following.name:
            raise DataError(
                f"{source} holds {place.name}.tar twice ({place.path} and {following.path}); keep one of them"
            )
    return places


def _outer_members(source: str, omissions: Omissions) -> list[tuple[str, int, int]]:
    members = list_members(TarPlace(source, 0, source))
    if members.damage:
        raise DataError(
            f"{source} {members.damage}; name a folder or an uncompressed tar (a .tar.gz must be unpacked "
            "first: its members cannot be read directly)"
        )
    for sentence in members.others:
        omissions.add(sentence)
    return members.files


def _list_synsets(
    source: str, places: Sequence[TarPlace], workers: int, omissions: Omissions
) -> FileReferences:
    root = source if os.path.isdir(source) else os.path.dirname(source)
    references = FileReferences(root)
    paths = dict.fromkeys(place.path for place in places)
    archives = {path: references.add_archive(os.path.relpath(path, root or ".")) for path in paths}
    members_by_place = processes.map_in_order(list_members, places, workers)
    for label, (place, members) in enumerate(zip(places, members_by_place, strict=True)):
        if members.damage:
            omissions.add(f"{place.name}.tar in {place.path} {members.damage}")
        for sentence in members.others:
            omissions.add(sentence)
        for name, offset, size in members.files:
            references.add(name, (label,), size, archives[place.path], offset)
    if not len(references):
        first = omissions.first[0] if omissions.first else "all are empty"
        raise DataError(f"the archives of {source} hold no images ({first}); download them again")
    return references


def _list_validation(
    images: str, labels: str, classes: Sequence[str], omissions: Omissions
) -> FileReferences:
    """The images in the order of their names: the n-th has the synset on line n of `labels`."""
    if os.path.isdir(images):
        root, files = images, [(os.path.relpath(path, images), 0, size) for path, size in list_files(images)]
    else:
        root, files = os.path.dirname(images), _outer_members(images, omissions)
    files.sort(key=lambda file: os.path.basename(file[0]))
    for name, _, _ in files:
        if not is_image_name(name):
            omissions.add(f"{name} in {images}: not an image by its name")
    files = [file for file in files if is_image_name(file[0])]
    synsets = _read_synsets(labels, classes)
    if len(files) != len(synsets):
        raise DataError(
            f"{images} holds {len(files):,} images and {labels} {len(synsets):,} synsets; "
            "write one per line, in the order of the file names"
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
        raise DataError(f"--val-labels {path} cannot be read ({error}); name a text file") from None
    known = set(classes)
    for line, synset in enumerate(synsets, 1):
        if synset not in known:
            raise DataError(
                f"{path}: line {line} is {synset!r}, not a synset of the training set; "
                f"write one like {classes[0]} on each line"
            )
    return synsets
