"""The 19 tasks of VTAB-1k (arXiv 1910.04867): classes, and which examples are in which split.

The slices are those of google-research/task_adaptation (data/*.py), the sizes those of
tensorflow-datasets 4.9 (TFDS). Slices are of TFDS splits in stored order: membership.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

TRAIN800, VAL200, TRAIN800VAL200, TEST = "train800", "val200", "train800val200", "test"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task; train800 is `train[:800]` of every one.

    sizes: the number of examples of each TFDS split that a slice is taken from.
    val200, test: the slices, as TFDS writes them.
    """

    name: str
    group: Literal["natural", "specialized", "structured"]
    num_classes: int
    sizes: Mapping[str, int]
    val200: str = "validation[:200]"
    test: str = "test"

    def slices(self) -> dict[str, str]:
        """The slices by the names that their shards have."""
        return {TRAIN800: "train[:800]", VAL200: self.val200, TEST: self.test}


# Sizes of data sets with two tasks each.
_CLEVR = {"train": 70_000, "validation": 15_000}
_DSPRITES = {"train": 737_280}
_SMALLNORB = {"train": 24_300, "test": 24_300}
_TASKS = (
    Task("caltech101", "natural", 102, {"train": 3060, "test": 6084}, "train[2754:2954]"),
    Task("cifar100", "natural", 100, {"train": 50_000, "test": 10_000}, "train[45000:45200]"),
    Task("dtd", "natural", 47, {"train": 1880, "validation": 1880, "test": 1880}),
    Task("flowers102", "natural", 102, {"train": 1020, "validation": 1020, "test": 6149}),
    Task("pets", "natural", 37, {"train": 3680, "test": 3669}, "train[2944:3144]"),
    Task("sun397", "natural", 397, {"train": 76_127, "validation": 10_875, "test": 21_750}),
    Task("svhn", "natural", 10, {"train": 73_257, "test": 26_032}, "train[65931:66131]"),
    Task("patch_camelyon", "specialized", 2, {"train": 262_144, "validation": 32_768, "test": 32_768}),
    Task("eurosat", "specialized", 10, {"train": 27_000}, "train[16200:16400]", "train[21600:]"),
    Task("resisc45", "specialized", 45, {"train": 31_500}, "train[18900:19100]", "train[25200:]"),
    Task("retinopathy", "specialized", 5, {"train": 35_126, "validation": 10_906, "test": 42_670}),
    Task("clevr_count", "structured", 8, _CLEVR, "train[63000:63200]", "validation"),
    Task("clevr_distance", "structured", 6, _CLEVR, "train[63000:63200]", "validation"),
    Task("dmlab", "structured", 6, {"train": 65_550, "validation": 22_628, "test": 22_735}),
    Task("dsprites_location", "structured", 16, _DSPRITES, "train[589824:590024]", "train[663552:]"),
    Task("dsprites_orientation", "structured", 16, _DSPRITES, "train[589824:590024]", "train[663552:]"),
    Task("kitti_distance", "structured", 4, {"train": 6347, "validation": 423, "test": 711}),
    Task("smallnorb_azimuth", "structured", 18, _SMALLNORB, "test[:200]", "test[12150:]"),
    Task("smallnorb_elevation", "structured", 9, _SMALLNORB, "test[:200]", "test[12150:]"),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
