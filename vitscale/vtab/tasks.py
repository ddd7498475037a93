"""The 19 tasks of VTAB-1k (arXiv 1910.04867): classes, and which examples are in which split.

The slices are those of google-research/task_adaptation (data/*.py), the sizes those of
tensorflow-datasets 4.9 (TFDS). Slices are of TFDS splits in stored order: membership.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

TRAIN800, VAL200, TRAIN800VAL200, TEST = "train800", "val200", "train800val200", "test"


@dataclasses.dataclass(frozen=True, kw_only=True)
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


_TASKS = (
    Task(
        name="caltech101",
        group="natural",
        num_classes=102,
        sizes={"train": 3060, "test": 6084},
        val200="train[2754:2954]",
    ),
    Task(
        name="cifar100",
        group="natural",
        num_classes=100,
        sizes={"train": 50_000, "test": 10_000},
        val200="train[45000:45200]",
    ),
    Task(
        name="dtd",
        group="natural",
        num_classes=47,
        sizes={"train": 1880, "validation": 1880, "test": 1880},
    ),
    Task(
        name="flowers102",
        group="natural",
        num_classes=102,
        sizes={"train": 1020, "validation": 1020, "test": 6149},
    ),
    Task(
        name="pets",
        group="natural",
        num_classes=37,
        sizes={"train": 3680, "test": 3669},
        val200="train[2944:3144]",
    ),
    Task(
        name="sun397",
        group="natural",
        num_classes=397,
        sizes={"train": 76_127, "validation": 10_875, "test": 21_750},
    ),
    Task(
        name="svhn",
        group="natural",
        num_classes=10,
        sizes={"train": 73_257, "test": 26_032},
        val200="train[65931:66131]",
    ),
    Task(
        name="patch_camelyon",
        group="specialized",
        num_classes=2,
        sizes={"train": 262_144, "validation": 32_768, "test": 32_768},
    ),
    Task(
        name="eurosat",
        group="specialized",
        num_classes=10,
        sizes={"train": 27_000},
        val200="train[16200:16400]",
        test="train[21600:]",
    ),
    Task(
        name="resisc45",
        group="specialized",
        num_classes=45,
        sizes={"train": 31_500},
        val200="train[18900:19100]",
        test="train[25200:]",
    ),
    Task(
        name="retinopathy",
        group="specialized",
        num_classes=5,
        sizes={"train": 35_126, "validation": 10_906, "test": 42_670},
    ),
    Task(
        name="clevr_count",
        group="structured",
        num_classes=8,
        sizes={"train": 70_000, "validation": 15_000},
        val200="train[63000:63200]",
        test="validation",
    ),
    Task(
        name="clevr_distance",
        group="structured",
        num_classes=6,
        sizes={"train": 70_000, "validation": 15_000},
        val200="train[63000:63200]",
        test="validation",
    ),
    Task(
        name="dmlab",
        group="structured",
        num_classes=6,
        sizes={"train": 65_550, "validation": 22_628, "test": 22_735},
    ),
    Task(
        name="dsprites_location",
        group="structured",
        num_classes=16,
        sizes={"train": 737_280},
        val200="train[589824:590024]",
        test="train[663552:]",
    ),
    Task(
        name="dsprites_orientation",
        group="structured",
        num_classes=16,
        sizes={"train": 737_280},
        val200="train[589824:590024]",
        test="train[663552:]",
    ),
    Task(
        name="kitti_distance",
        group="structured",
        num_classes=4,
        sizes={"train": 6347, "validation": 423, "test": 711},
    ),
    Task(
        name="smallnorb_azimuth",
        group="structured",
        num_classes=18,
        sizes={"train": 24_300, "test": 24_300},
        val200="test[:200]",
        test="test[12150:]",
    ),
    Task(
        name="smallnorb_elevation",
        group="structured",
        num_classes=9,
        sizes={"train": 24_300, "test": 24_300},
        val200="test[:200]",
        test="test[12150:]",
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
