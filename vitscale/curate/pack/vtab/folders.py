"""The data sets whose only labels are folders: EuroSAT, Resisc45 and Caltech101."""

import re
from pathlib import Path

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import Files, StoredFile, open_files, open_held
from vitscale.curate.pack.vtab.examples import Examples, held, make_listing
from vitscale.errors import DataError
from vitscale.vtab.membership import stored_order
from vitscale.vtab.tasks import TASKS

# CLASS/CLASS_NUMBER.jpg, the folder twice as in Forest/Forest_687.jpg
_NAMED_AS_FOLDER = re.compile(r"(?:.*/)?([^/]+)/(\1_\d+\.jpg)")
_CALTECH = re.compile(r"(?:.*/)?([^/]+)/(image_\d+\.jpg)")
_CALTECH_INNER = "101_ObjectCategories.tar.gz"
_CALTECH_TRAIN = 30  # images of each class
_EUROSAT_ADVICE = "vtab/eurosat reads EuroSAT.zip (RGB), or the folder that it unpacks to: CLASS/CLASS_1.jpg"
_RESISC_ADVICE = (
    "vtab/resisc45 reads the folder that NWPU-RESISC45.rar unpacks to: CLASS/CLASS_001.jpg "
    "(unpack it with unrar x or bsdtar -xf)"
)
_CALTECH_ADVICE = (
    "vtab/caltech101 reads caltech-101.zip, the 101_ObjectCategories.tar.gz in it, or the folder of that: "
    "CLASS/image_0001.jpg"
)


def list_eurosat(source: str, config: PackConfig) -> Listing:
    """EuroSAT.zip: keys as Forest_Forest_687.jpg, all of one TFDS split."""
    return _list_named_as_folder(source, "eurosat", _EUROSAT_ADVICE, ("EuroSAT",))


def list_resisc45(source: str, config: PackConfig) -> Listing:
    """The folder of NWPU-RESISC45: keys as palace_palace_207.jpg, all of one TFDS split."""
    return _list_named_as_folder(source, "resisc45", _RESISC_ADVICE, ("NWPU-RESISC45",))


def list_caltech101(source: str, config: PackConfig) -> Listing:
    """caltech-101.zip, with keys as Faces/image_0001.jpg.

    TFDS draws its training split by numpy's seed 1234 from folders in the order of its file
    system, so it cannot be derived. --membership names a file of its keys, one per line, and
    all other images are the test set. Without it, the training split is, of each class, the 30
    images whose keys come first in stored order; this is not the published split.
    """
    files = open_files(source, _CALTECH_ADVICE, ("caltech-101", "101_ObjectCategories"))
    inner = [file for name, file in files.by_name.items() if name.endswith(f"/{_CALTECH_INNER}")]
    images = _images(files, _CALTECH)
    if inner and not images:
        images = _images(open_held(inner[0], source, _CALTECH_ADVICE), _CALTECH)
    if not images:
        files.prefix("image_0001.jpg")
    classes = sorted({key.partition("/")[0].lower() for key in images})
    train, deviations = _caltech_train(sorted(images), source, config.membership)
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, keys in (("train", train), ("test", sorted(images.keys() - set(train)))):
        labels = [label_of[key.partition("/")[0].lower()] for key in keys]
        splits[split] = Examples(keys=keys, labels=labels, images=held([images[key] for key in keys]))
    return make_listing(TASKS["caltech101"], source, splits, classes, deviations)


def _list_named_as_folder(source: str, task: str, advice: str, archives: tuple[str, ...]) -> Listing:
    files = open_files(source, advice, archives)
    images = _images(files, _NAMED_AS_FOLDER)
    if not images:
        files.prefix("CLASS/CLASS_1.jpg")
    names = sorted(images)
    classes = sorted({name.partition("/")[0] for name in names})
    label_of = {name: label for label, name in enumerate(classes)}
    examples = Examples(
        keys=[name.replace("/", "_") for name in names],
        labels=[label_of[name.partition("/")[0]] for name in names],
        images=held([images[name] for name in names]),
    )
    return make_listing(TASKS[task], source, {"train": examples}, classes)


def _images(files: Files, pattern: re.Pattern[str]) -> dict[str, StoredFile]:
    """CLASS/NAME of the images to their files. Raises DataError for two of one name."""
    images, names = dict[str, StoredFile](), dict[str, str]()
    for name, file in files.by_name.items():
        if match := pattern.fullmatch(name):
            key = f"{match[1]}/{match[2]}"
            if key in images:
                raise DataError(f"{files.source} holds {names[key]} and {name}; keep one of them")
            images[key], names[key] = file, name
    return images


def _caltech_train(keys: list[str], source: str, membership: str) -> tuple[list[str], list[str]]:
    """The keys of the training split, and why it is not the published one."""
    if not membership:
        by_class: dict[str, list[str]] = {}
        for row in stored_order("train", keys):
            by_class.setdefault(keys[row].partition("/")[0], []).append(keys[row])
        train = [key for class_keys in by_class.values() for key in class_keys[:_CALTECH_TRAIN]]
        return train, [
            f"TFDS draws its training split at random; here it is the {_CALTECH_TRAIN} images of each class "
            "that come first in stored order, as no --membership names it"
        ]
    try:
        lines = Path(membership).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--membership {membership} cannot be read ({error}); name a text file") from None
    train = [line.strip() for line in lines if line.strip()]
    unknown = sorted(set(train) - set(keys))
    if unknown or not train:
        what = f"names {unknown[0]}, which {source} does not hold" if unknown else "names no image"
        raise DataError(
            f"--membership {membership} {what}; write the images of TFDS's training split, one per line, "
            "like Faces/image_0001.jpg"
        )
    return train, []
