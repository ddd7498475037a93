"""What a training step minimises ([objective]): from a micro batch and a model to a loss.

An objective knows neither engine nor ranks: it calls the forward pass that it is given, once,
and its randomness depends on where the micro batch is in the run, not on who computes it.
To add a kind: write its config and its Objective here, name the config in ObjectiveConfig,
and build the objective in build_objective.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.data.transforms import AugmentConfig, normalize
from vitscale.losses import LossConfig, compute_loss, to_targets
from vitscale.mixup import mix

# From fp32 pixels to logits. It casts to the engine's dtype itself.
Forward = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B C"]]


class BatchKey(NamedTuple):
    """Where a micro batch is in the run, which keys the randomness of its loss.

    first_position: row 0's position in the step's global batch. So a sample's loss is the same
    however the global batch is cut into ranks and micro batches.
    """

    seed: int
    step: int
    first_position: int


@runtime_checkable
class Objective(Protocol):
    """What a step minimises."""

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        """The mean loss of a micro batch on its device, in fp32. labels: padded with -1."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Predict the labels ([objective] with kind = "classification"), by the loss of [loss]."""

    kind: Literal["classification"] = "classification"


ObjectiveConfig = ClassificationConfig  # [objective]: later a union of the kinds


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
        pixels, targets = mix(
            normalize(images, torch.float32),
            to_targets(labels, self.num_classes),
            mixup=self.augment.mixup,
            cutmix=self.augment.cutmix,
            switch=self.augment.cutmix_share,
            seed=key.seed,
            step=key.step,
            first_position=key.first_position,
        )
        return compute_loss(self.loss_config, forward(pixels), targets)


def build_objective(
    config: ObjectiveConfig, *, loss: LossConfig, augment: AugmentConfig, num_classes: int
) -> Objective:
    """The objective of a config. loss, augment: the sections that classification also reads."""
    match config:
        case ClassificationConfig():
            return Classification(loss_config=loss, augment=augment, num_classes=num_classes)
