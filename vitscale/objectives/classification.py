"""Labels are predicted: the first kind of objective, and what others share with it."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.config import check_choices
from vitscale.data.transforms import AugmentConfig, normalize
from vitscale.objectives.losses import LossConfig, compute_loss, to_targets
from vitscale.objectives.mixup import mix
from vitscale.objectives.objective import BatchKey, Forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Predict the labels ([objective] with kind = "classification"), by the loss of [loss]."""

    kind: Literal["classification"] = "classification"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy of the labels, with mixup and cutmix where [augment] turns them on."""

    loss_config: LossConfig
    augment: AugmentConfig
    num_classes: int

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        pixels, targets = mixed(images, labels, self.augment, self.num_classes, key)
        return compute_loss(self.loss_config, forward(pixels), targets)


def mixed(
    images: UInt8[Tensor, "B 3 H W"],
    labels: Int64[Tensor, "B M"],
    augment: AugmentConfig,
    num_classes: int,
    key: BatchKey,
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C"]]:
    """Pixels in [-1, 1] and targets, after mixup and cutmix."""
    return mix(
        normalize(images, torch.float32),
        to_targets(labels, num_classes),
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        switch=augment.cutmix_share,
        seed=key.seed,
        step=key.step,
        first_position=key.first_position,
    )
