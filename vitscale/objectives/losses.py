"""Losses of logits in fp32: on soft or multi-hot targets, and on a teacher's logits."""

import dataclasses
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitscale.config import check_choices
from vitscale.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of the classification objective ([loss]).

    name:             "softmax" for one class per image; "sigmoid" also for several, as in
                      ImageNet-21k and JFT
    label_smoothing:  the share of the targets that is spread evenly over all classes, in [0, 1)
    """

    name: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"loss.label_smoothing {self.label_smoothing} must lie in [0, 1); 0.1 is usual, 0 is none"
            )


DistillationTarget = Literal["hard", "soft"]


def to_targets(labels: Int64[Tensor, "B M"], num_classes: int) -> Float[Tensor, "B C"]:
    """Labels, padded with -1, as multi-hot rows: [2, -1] of 4 classes is [0, 0, 1, 0]."""
    # The padding goes to a class of its own, which is then cut off.
    targets = labels.new_zeros(len(labels), num_classes + 1)
    return targets.scatter_(1, labels.where(labels >= 0, num_classes), 1)[:, :num_classes].float()


def compute_loss(
    config: LossConfig, logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"]
) -> Float[Tensor, ""]:
    """The mean over the batch of the cross-entropy (sample_losses)."""
    return sample_losses(config, logits, targets).mean()


def sample_losses(
    config: LossConfig, logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"]
) -> Float[Tensor, " B"]:
    """The cross-entropy of each image, in fp32 (big_vision utils.py).

    "sigmoid" sums the binary cross-entropies of an image's classes. With label_smoothing e, a
    target t of C classes counts as (1 - e) t + e / C (timm's losses, both kinds).
    """
    logits = logits.float()
    if config.label_smoothing:
        share = config.label_smoothing
        targets = targets * (1 - share) + share / targets.shape[-1]
    if config.name == "softmax":
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)
    # Not binary_cross_entropy_with_logits, which in fp32 is 1% off at a logit of -10, where the
    # head for ImageNet-21k starts.
    return (F.softplus(logits) - logits * targets).sum(-1)


def distillation_loss(
    target: DistillationTarget,
    logits: Float[Tensor, "B C"],
    teacher: Float[Tensor, "B C"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """How far a student's logits are from its teacher's, on average (DeiT losses.py).

        "hard"    cross-entropy with the class that is the teacher's first
        "soft"    T^2 KL(softmax(teacher / T) || softmax(logits / T)) / C

    The division by C is that of DeiT's code, which divides the batch's sum by all B C values.
    """
    if target == "hard":
        return F.cross_entropy(logits.float(), teacher.argmax(dim=-1))
    log_student, log_teacher = (F.log_softmax(z.float() / temperature, dim=-1) for z in (logits, teacher))
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / logits.numel()
