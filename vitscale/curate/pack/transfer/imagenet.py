"""Test sets in the classes of ImageNet-1k: ImageNet-ReaL and ImageNet-V2.

Label i is the i-th WordNet id in rising order, as in the shards of --format imagenet1k.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vitscale.curate.pack.config import Omissions, PackConfig
from vitscale.curate.pack.imagefolder import is_image_name
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.transfer.whole import TransferSet, make_listing
from vitscale.curate.pack.vtab.archives import StoredFile, open_files
from vitscale.curate.pack.vtab.examples import ExampleReference
from vitscale.errors import DataError

NUM_CLASSES = 1000
REAL = TransferSet(name="imagenet_real", num_classes=NUM_CLASSES, sizes={"val": 50_000})
V2 = TransferSet(name="imagenet_v2", num_classes=NUM_CLASSES, sizes={"test": 10_000})
REAL_WITHOUT, REAL_LABELS = 3_163, 57_553  # images without a label, and labels of all images
V2_PER_CLASS = 10

_REAL_ADVICE = "imagenet_real reads ILSVRC2012_img_val.tar, or a folder of its JPEGs"
_V2_ADVICE = (
    "imagenet_v2 reads imagenetv2-matched-frequency.tar.gz, or the folder that it unpacks to: "
    "CLASS/IMAGE.jpeg with the classes 0 to 999"
)
_NUMBERED = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)")
_IN_CLASS = re.compile(r"((?:.*/)?)([0-9]{1,9})/([^/]+)")


def list_imagenet_real(source: str, config: PackConfig) -> Listing:
    """The validation images, with the labels of real.json (--val-labels).

    Its n-th list is for ILSVRC2012_val_0000000n.JPEG. An image may have several labels, or
    none: then an evaluation leaves it out (Beyer et al., arXiv 2006.07159).

    Raises DataError unless the images are those of 1 to the number of lists, each once.
    """
    labels = read_real(config.val_labels)
    files = open_files(source, _REAL_ADVICE, ("ILSVRC2012_img_val",))
    images = dict[int, tuple[str, StoredFile]]()
    for path, file in files.by_name.items():
        if match := _NUMBERED.fullmatch(path):
            number = int(match[2])
            if number in images:
                raise DataError(f"{source} holds {match[1]} twice; keep one of them")
            images[number] = (match[1], file)
    if not images:
        files.prefix("ILSVRC2012_val_00000001.JPEG")
    _check_numbers(source, config.val_labels, images, len(labels))
    rows = [ExampleReference(file, name, labels[n - 1]) for n, (name, file) in sorted(images.items())]
    without, total = sum(not row for row in labels), sum(map(len, labels))
    deviations = [
        f"{found:,} {what} instead of {published:,}"
        for found, published, what in (
            (without, REAL_WITHOUT, "images have no label"),
            (total, REAL_LABELS, "labels in all"),
        )
        if found != published
    ]
    details = [f"{without:,} of them without a label: {len(labels) - without:,} count"]
    return make_listing(REAL, source, {"val": rows}, details=details, deviations=deviations)


def list_imagenet_v2(source: str, config: PackConfig) -> Listing:
    """imagenetv2-matched-frequency.tar.gz, or another of the three sets of that layout.

    The folders are class numbers, so "10" comes after "9" here, not after "1".
    """
    files = open_files(source, _V2_ADVICE, ("imagenetv2-matched-frequency",))
    omissions, roots, images = Omissions(), set[str](), list[tuple[int, str, StoredFile]]()
    for path, file in files.by_name.items():
        match = _IN_CLASS.fullmatch(path)
        if not match:
            continue
        if not is_image_name(path):
            omissions.add(f"{path} in {source}: not an image by its name")
            continue
        root, folder, name = match.groups()
        if str(int(folder)) != folder or int(folder) >= NUM_CLASSES:
            raise DataError(
                f"{source} holds the folder {root}{folder}, which is no class number from 0 to "
                f"{NUM_CLASSES - 1}; {_V2_ADVICE}"
            )
        roots.add(root)
        images.append((int(folder), name, file))
    if not images:
        files.prefix("0/IMAGE.jpeg")
    if len(roots) > 1:
        first, second = sorted(roots)[:2]
        raise DataError(
            f"{source} holds class folders in {first or './'} and in {second}; name the folder of one set"
        )
    images.sort(key=lambda image: image[:2])
    rows = [ExampleReference(file, f"{label}/{name}", (label,)) for label, name, file in images]
    counts = Counter(label for label, _, _ in images)
    others = [label for label in range(NUM_CLASSES) if counts[label] != V2_PER_CLASS]
    deviations = [
        f"{len(others):,} classes have another number of images than {V2_PER_CLASS}, like {label} with "
        f"{counts[label]}"
        for label in others[:1]
    ]
    return make_listing(V2, source, {"test": rows}, deviations=deviations, omissions=omissions)


def read_real(path: str) -> list[tuple[int, ...]]:
    """The class numbers of each image in real.json, a list of lists.

    Raises DataError for a file that is no such list, or that has an impossible label.
    """
    how = "it is a list of lists of class numbers; download real.json again"
    try:
        rows = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(
            f"--val-labels {path} cannot be read ({error.strerror or error}); name real.json"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"--val-labels {path} is cut or not JSON; {how}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"--val-labels {path} is not a list with a list for each image; {how}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or not all(_is_class(label) for label in row):
            raise DataError(
                f"--val-labels {path} has no list of classes 0 to {NUM_CLASSES - 1} for image {number:,}; "
                f"{how}"
            )
    return [tuple(dict.fromkeys(row)) for row in rows]


def _is_class(label: object) -> bool:
    return type(label) is int and 0 <= label < NUM_CLASSES


def _check_numbers(source: str, labels: str, numbers: Iterable[int], count: int) -> None:
    present, wanted = set(numbers), set(range(1, count + 1))
    if missing := sorted(wanted - present):
        raise DataError(
            f"{source} holds no ILSVRC2012_val_{missing[0]:08d}.JPEG ({len(missing):,} of {count:,} images "
            f"of {labels} are missing); download ILSVRC2012_img_val.tar again"
        )
    if surplus := sorted(present - wanted):
        raise DataError(
            f"{source} holds ILSVRC2012_val_{surplus[0]:08d}.JPEG, but {labels} has {count:,} lists; "
            "download real.json again"
        )
