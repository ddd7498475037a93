"""ObjectNet (Barbu et al., NeurIPS 2019) in the classes of ImageNet-1k.

Its mappings/ say which folder shows which ImageNet classes:

    folder_to_objectnet_label.json       "alarm_clock": "Alarm clock"
    objectnet_to_imagenet_1k.json        "Alarm clock": "analog clock; digital clock"
    imagenet_to_label_2012_v2            line 426, from 0: analog clock
    pytorch_to_imagenet_2012_id.json     "409": 426, so analog clock is class 409

Class i is the i-th WordNet id in rising order. A name may have commas, as "tench, Tinca tinca".
"""

import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vitscale.curate.pack.config import Omissions, PackConfig
from vitscale.curate.pack.imagefolder import is_image_name
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.transfer.whole import TransferSet, make_listing
from vitscale.curate.pack.vtab.archives import Files, StoredFile, open_files
from vitscale.curate.pack.vtab.examples import ConvertedImage, ExampleReference
from vitscale.data.decode import DamagedImage, decode
from vitscale.errors import DataError

OBJECTNET = TransferSet(name="objectnet", num_classes=1000, sizes={})
NUM_IMAGES, NUM_FOLDERS, NUM_OVERLAPPING = 50_273, 313, 113
# The border is 1 pixel wide. The authors' own loader cuts 2 (objectnet-template-pytorch,
# objectnet_pytorch_dataloader.py), and so do those who published figures.
BORDER = 2

_ADVICE = (
    "objectnet reads the folder objectnet-1.0 that objectnet-1.0.zip unpacks to, with images/ and mappings/"
)
_LABELS = "mappings/imagenet_to_label_2012_v2"
_INDICES = "mappings/pytorch_to_imagenet_2012_id.json"
_FOLDERS = "mappings/folder_to_objectnet_label.json"
_OVERLAP = "mappings/objectnet_to_imagenet_1k.json"


def list_objectnet(source: str, config: PackConfig) -> Listing:
    """The images whose folder shows an ImageNet class, without their border.

    The labels are all classes of the folder: any one counts as right. The other folders are
    left out, and the report says so.

    Raises DataError for mappings that do not fit together, and for a folder that has no image.
    """
    if not os.path.isdir(source):
        raise DataError(
            f"{source} is not a folder; {_ADVICE}: unzip it with the password that objectnet.dev gives "
            "with it"
        )
    files = open_files(source, _ADVICE)
    names, labels = read_mappings(files)
    by_folder = _images(files)
    if absent := sorted(folder for folder in labels if folder not in by_folder):
        raise DataError(
            f"{source} holds no image in images/{absent[0]} ({len(absent):,} of the {len(labels):,} folders "
            f"of {_OVERLAP} have none); unzip the archive again, whole"
        )
    omissions = Omissions()
    others = {folder: len(images) for folder, images in by_folder.items() if folder not in labels}
    if others:
        omissions.add(
            f"{len(others):,} folders that show no class of ImageNet, like {min(others)}: "
            f"{sum(others.values()):,} images",
            sum(others.values()),
        )
    rows = [
        ExampleReference(ConvertedImage(file, without_border), f"{folder}/{name}", labels[folder])
        for folder in sorted(labels)
        for name, file in sorted(by_folder[folder].items())
    ]
    num_images = sum(map(len, by_folder.values()))
    deviations = [
        f"{found:,} {what} instead of {published:,}"
        for found, published, what in (
            (num_images, NUM_IMAGES, "images in all"),
            (len(by_folder), NUM_FOLDERS, "folders"),
            (len(labels), NUM_OVERLAPPING, "folders that show classes of ImageNet"),
            (len(names), OBJECTNET.num_classes, "classes of ImageNet"),
        )
        if found != published
    ]
    details = [f"{len(labels):,} of {len(by_folder):,} folders"]
    return make_listing(
        OBJECTNET,
        source,
        {"test": rows},
        names,
        details=details,
        deviations=deviations,
        omissions=omissions,
    )


def without_border(image: bytes) -> bytes:
    """Cut BORDER pixels from each side, and encode what remains without a loss."""
    try:
        pixels = decode(image)
    except DamagedImage as damage:
        raise DataError(f"cannot be decoded ({damage})") from None
    inside = pixels[BORDER:-BORDER, BORDER:-BORDER]
    if not inside.size:
        raise DataError(f"has {pixels.shape[1]} x {pixels.shape[0]} pixels, and nothing inside its border")
    buffer = io.BytesIO()
    # Photographs of a phone: the highest compression takes seconds for each, and saves a tenth.
    Image.fromarray(np.ascontiguousarray(inside)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_mappings(files: Files) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """The names of the ImageNet classes by index, and by folder the classes that it shows.

    A folder that shows none is left out. Raises DataError for files that do not fit together.
    """
    lines = files.lines(_LABELS)
    names = [""] * len(lines)
    for index, line in _indices(files, len(lines)).items():
        names[index] = lines[line]
    by_name = defaultdict[str, list[int]](list)
    for index, name in enumerate(names):
        by_name[name].append(index)
    overlap = _texts(files, _OVERLAP)
    folders = _texts(files, _FOLDERS)
    labels = {
        folder: _classes(files, label, overlap[label], by_name)
        for folder, label in folders.items()
        if label in overlap
    }
    if unknown := sorted(set(overlap) - set(folders.values())):
        raise DataError(
            f"{_OVERLAP} in {files.source} has {unknown[0]!r}, which {_FOLDERS} does not; restore mappings/"
        )
    counts = Counter(names)  # two classes are named "crane"
    distinct = [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names)]
    return distinct, labels


def _classes(files: Files, label: str, written: str, by_name: Mapping[str, list[int]]) -> tuple[int, ...]:
    classes = []
    for name in written.split("; "):
        if len(by_name.get(name, ())) != 1:
            what = "names twice" if name in by_name else "does not name"
            raise DataError(
                f"{_OVERLAP} in {files.source} has {name!r} for {label!r}, which {_LABELS} {what}; "
                "restore mappings/"
            )
        classes += by_name[name]
    return tuple(sorted(set(classes)))


def _indices(files: Files, count: int) -> dict[int, int]:
    """The line of each class in the list of names, both from 0: a permutation."""
    lines, wanted = _read_json(files, _INDICES), {*range(count)}
    values = [value for value in lines.values() if type(value) is int]
    if {*lines} != {*map(str, wanted)} or len(values) != len(lines) or {*values} != wanted:
        raise DataError(
            f"{_INDICES} in {files.source} does not give each of the {count:,} lines of {_LABELS} to one "
            "class; restore mappings/"
        )
    return {int(key): line for key, line in lines.items()}


def _texts(files: Files, name: str) -> dict[str, str]:
    values = _read_json(files, name)
    if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
        raise DataError(f"{name} in {files.source} has no text for {wrong[0]!r}; restore mappings/")
    return values


def _read_json(files: Files, name: str) -> dict[str, Any]:
    content = files.read(name)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{name} in {files.source} is cut or not JSON; restore mappings/") from None
    if not isinstance(values, dict):
        raise DataError(f"{name} in {files.source} is not a JSON object; restore mappings/")
    return values


def _images(files: Files) -> dict[str, dict[str, StoredFile]]:
    """The images of every folder, by name."""
    inside = re.compile(re.escape(files.prefix(_OVERLAP)) + r"images/([^/]+)/([^/]+)")
    found = defaultdict[str, dict[str, StoredFile]](dict)
    for path, file in files.by_name.items():
        if (match := inside.fullmatch(path)) and is_image_name(path):
            found[match[1]][match[2]] = file
    return found
