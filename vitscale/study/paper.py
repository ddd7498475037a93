"""The paper's results (arXiv 2010.11929) in percent, for tables and plots beside our own."""

from collections.abc import Mapping
from typing import NamedTuple

# In the order of the paper's columns; the names are those of recipes in configs/study/.
TARGETS = {
    "imagenet": "ImageNet",
    "imagenet_real": "ImageNet ReaL",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "pets": "Oxford-IIIT Pets",
    "flowers102": "Oxford Flowers-102",
    "vtab": "VTAB (19 tasks)",
}
# Test sets of another row's recipe (finetune.test_sets): nothing is trained for them.
TEST_SET_OF = {"imagenet_real": "imagenet"}
# What Table 7 averages over, in the paper and in Average-5 of Figure 5.
AVERAGE5 = ("imagenet", "cifar10", "cifar100", "pets", "flowers102")


class Pretrained(NamedTuple):
    """A row of Table 6: fine-tuned at 384 px after so many epochs of JFT-300M."""

    family: str
    epochs: int
    exaflops: int
    accuracy: Mapping[str, float]


def _row(family: str, epochs: int, exaflops: int, *accuracies: float) -> Pretrained:
    targets = ("imagenet", "imagenet_real", "cifar10", "cifar100", "pets", "flowers102")
    return Pretrained(family, epochs, exaflops, dict(zip(targets, accuracies, strict=True)))


TABLE6 = {
    "ViT-B/32 7": _row("ViT", 7, 55, 80.73, 86.27, 98.61, 90.49, 93.40, 99.27),
    "ViT-B/16 7": _row("ViT", 7, 224, 84.15, 88.85, 99.00, 91.87, 95.80, 99.56),
    "ViT-L/32 7": _row("ViT", 7, 196, 84.37, 88.28, 99.19, 92.52, 95.83, 99.45),
    "ViT-L/16 7": _row("ViT", 7, 783, 86.30, 89.43, 99.38, 93.46, 96.81, 99.66),
    "ViT-L/16 14": _row("ViT", 14, 1567, 87.12, 89.99, 99.38, 94.04, 97.11, 99.56),
    "ViT-H/14 14": _row("ViT", 14, 4262, 88.08, 90.36, 99.50, 94.71, 97.11, 99.71),
    "R50x1 7": _row("ResNet", 7, 50, 77.54, 84.56, 97.67, 86.07, 91.11, 94.26),
    "R50x2 7": _row("ResNet", 7, 199, 82.12, 87.94, 98.29, 89.20, 93.43, 97.02),
    "R101x1 7": _row("ResNet", 7, 96, 80.67, 87.07, 98.48, 89.17, 94.08, 95.95),
    "R152x1 7": _row("ResNet", 7, 141, 81.88, 87.96, 98.82, 90.22, 94.17, 96.94),
    "R152x2 7": _row("ResNet", 7, 563, 84.97, 89.69, 99.06, 92.05, 95.37, 98.62),
    "R152x2 14": _row("ResNet", 14, 1126, 85.56, 89.89, 99.24, 91.92, 95.75, 98.75),
    "R200x3 14": _row("ResNet", 14, 3306, 87.22, 90.15, 99.34, 93.53, 96.32, 99.04),
    "R50+ViT-B/32 7": _row("Hybrid", 7, 106, 84.90, 89.15, 99.01, 92.24, 95.75, 99.46),
    "R50+ViT-B/16 7": _row("Hybrid", 7, 274, 85.58, 89.65, 99.14, 92.63, 96.65, 99.40),
    "R50+ViT-L/32 7": _row("Hybrid", 7, 246, 85.68, 89.04, 99.24, 92.93, 96.97, 99.43),
    "R50+ViT-L/16 7": _row("Hybrid", 7, 859, 86.60, 89.72, 99.18, 93.64, 97.03, 99.40),
    "R50+ViT-L/16 14": _row("Hybrid", 14, 1668, 87.12, 89.76, 99.31, 93.89, 97.36, 99.11),
}

# Figure 3, from Table 5: ImageNet top-1 after fine-tuning, by images of the pretraining set.
IMAGENET, IN21K, JFT = 1_281_167, 14_200_000, 303_000_000
FIGURE3: Mapping[str, Mapping[int, float]] = {
    "ViT-B/32": {IMAGENET: 73.38, IN21K: 81.28, JFT: 80.73},
    "ViT-B/16": {IMAGENET: 77.91, IN21K: 83.97, JFT: 84.15},
    "ViT-L/32": {IMAGENET: 71.16, IN21K: 80.99, JFT: 84.37},
    "ViT-L/16": {IMAGENET: 76.53, IN21K: 85.15, JFT: 87.12},
    "ViT-H/14": {IN21K: 85.13, JFT: 88.04},
}


class Headline(NamedTuple):
    """A column of Table 2: means and deviations of three fine-tunings, and the cost."""

    accuracy: Mapping[str, tuple[float, float]]
    core_days: int  # of TPUv3 cores, of which a chip has two


_CORE_DAYS = {
    "ViT-H/14 (JFT)": 2_500,
    "ViT-L/16 (JFT)": 680,
    "ViT-L/16 (I21k)": 230,
    "BiT-L (R152x4)": 9_900,
    "Noisy Student (EffNet-L2)": 12_300,
}
_TABLE2 = {  # in the order of these models
    "imagenet": ((88.55, 0.04), (87.76, 0.03), (85.30, 0.02), (87.54, 0.02), (88.50, 0.00)),
    "imagenet_real": ((90.72, 0.05), (90.54, 0.03), (88.62, 0.05), (90.54, 0.00), (90.55, 0.00)),
    "cifar10": ((99.50, 0.06), (99.42, 0.03), (99.15, 0.03), (99.37, 0.06)),
    "cifar100": ((94.55, 0.04), (93.90, 0.05), (93.25, 0.05), (93.51, 0.08)),
    "pets": ((97.56, 0.03), (97.32, 0.11), (94.67, 0.15), (96.62, 0.23)),
    "flowers102": ((99.68, 0.02), (99.74, 0.00), (99.61, 0.02), (99.63, 0.03)),
    "vtab": ((77.63, 0.23), (76.28, 0.46), (72.72, 0.21), (76.29, 1.70)),
}
TABLE2 = {
    model: Headline({name: row[column] for name, row in _TABLE2.items() if column < len(row)}, core_days)
    for column, (model, core_days) in enumerate(_CORE_DAYS.items())
}
# What a TPUv3 core sustained: 1,567 exaFLOPs of ViT-L/16, 14 epochs, in 680 core-days.
TPUV3_CORE_FLOPS = 1567e18 / (680 * 86_400)
