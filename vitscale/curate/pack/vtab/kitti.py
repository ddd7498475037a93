"""KITTI's object images: TFDS splits the official training part by video."""

from collections.abc import Sequence

import numpy as np

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import Files, open_files
from vitscale.curate.pack.vtab.examples import Examples, make_listing, named
from vitscale.errors import DataError
from vitscale.vtab.labels import kitti_distance
from vitscale.vtab.tasks import TASKS

_ADVICE = (
    "vtab/kitti_distance reads a folder with data_object_image_2.zip and data_object_label_2.zip, or with "
    "the training/ that they unpack to"
)
_DEVKIT_ADVICE = (
    "put devkit_object.zip into the source, or name it or its folder with --membership: its mapping/ says "
    "which video an image is from"
)
_NUM_FIELDS = 15  # of a line of label_2: type first, location x y z as 12th to 14th
_LEFT_OUT = "DontCare"


def list_kitti_distance(source: str, config: PackConfig) -> Listing:
    """training/image_2 and training/label_2 with the mapping files of devkit_object.zip."""
    devkit = open_files(config.membership or source, _DEVKIT_ADVICE, ("devkit_object",))
    files = open_files(source, _ADVICE, ("data_object_image_2", "data_object_label_2"))
    splits = {}
    for split, images in split_by_video(image_videos(devkit)).items():
        splits[split] = Examples(
            keys=[f"{image:06d}.png" for image in images],
            labels=[_label(files, image) for image in images],
            images=named(files, [f"training/image_2/{image:06d}.png" for image in images], "the devkit"),
        )
    return make_listing(TASKS["kitti_distance"], source, splits)


def split_by_video(videos: Sequence[str]) -> dict[str, list[int]]:
    """The images of each split, given the video of each (TFDS kitti 3.3.0, _build_splits).

    Of the sorted names, a tenth of the videos is drawn for the test set, and then as many of
    the others for validation: 14 and 14 of the 141.
    """
    rng = np.random.RandomState(123)
    names = sorted(set(videos))
    num_drawn = max(1, 10 * len(names) // 100)
    if len(names) < 2 * num_drawn + 1:
        raise DataError(f"the images are from {len(names)} videos; KITTI's split by video needs 3 at least")
    test = set(rng.choice(names, num_drawn, replace=False))
    validation = set(rng.choice(sorted(set(names) - test), num_drawn, replace=False))
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for image, video in enumerate(videos):
        splits["test" if video in test else "validation" if video in validation else "train"].append(image)
    return splits


def image_videos(devkit: Files) -> list[str]:
    """The video of every image: entry i of train_rand.txt is the line, from 1, of image i."""
    numbers = [
        word for line in devkit.lines("mapping/train_rand.txt") for word in line.split(",") if word.strip()
    ]
    lines = devkit.lines("mapping/train_mapping.txt")
    videos = []
    for number in numbers:
        line = int(number) if number.strip().isdecimal() else 0
        words = lines[line - 1].split() if 1 <= line <= len(lines) else []
        if len(words) != 3:
            raise DataError(
                f"mapping/train_rand.txt in {devkit.source} names line {number.strip()} of "
                f"train_mapping.txt, which has {len(lines):,} lines DATE DRIVE FRAME; download "
                "devkit_object.zip again"
            )
        videos.append(words[1])
    return videos


def _label(files: Files, image: int) -> int:
    name = f"training/label_2/{image:06d}.txt"
    objects = []
    for line in files.lines(name):
        words = line.split()
        try:
            if words[0] != _LEFT_OUT:
                objects.append((words[0], float(words[_NUM_FIELDS - 2])))
        except (ValueError, IndexError):
            raise DataError(
                f"{name} in {files.source} has the line {line!r}, not one of {_NUM_FIELDS} fields with "
                "the depth as the 14th; download it again"
            ) from None
    return kitti_distance(objects)
