"""Labels are predicted, and what a teacher says of the images."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.config import check_choices
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.objectives.classification import mixed
from vitscale.objectives.losses import DistillationTarget, LossConfig, compute_loss, distillation_loss
from vitscale.objectives.objective import BatchKey, Forward

TIMM = "timm:"  # before the name of a teacher that timm has
Teaching = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B C"]]  # pixels in [-1, 1] to logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Predict the labels and what a teacher says ([objective] with kind = "distillation").

    Sources: DeiT (arXiv 2012.12877) with model.distilled, whose second head learns from the
    teacher; without, the one head learns from both, and with alpha = 1 and "soft" this is the
    function matching of "a good teacher is patient and consistent" (arXiv 2106.05237). The
    teacher sees the student's images, augmented and mixed.

    teacher:          a run, a step directory, an export of vitscale, or one of Google's .npz
                      files; or timm:NAME
    teacher_weights:  a safetensors file for timm:NAME; "" = timm's pretrained ones
    target:           "hard", the teacher's first class, or "soft", its softmax
    alpha:            the share of the teacher's loss; the rest is that of [loss]
    temperature:      divides both logits of a "soft" target
    """

    kind: Literal["distillation"] = "distillation"
    teacher: str = ""
    teacher_weights: str = ""
    target: DistillationTarget = "hard"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.teacher or self.teacher == TIMM:
            raise ConfigError(
                "objective.teacher is missing: name a run, a step directory, an export or an .npz file, or a "
                'model of timm, like "timm:regnety_160"'
            )
        if self.teacher_weights and not self.is_timms:
            raise ConfigError(
                f"objective.teacher_weights is for a model of timm, and objective.teacher {self.teacher} "
                "has its own; leave it out"
            )
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"objective.alpha {self.alpha} must lie in (0, 1]; DeiT has 0.5")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"objective.temperature {self.temperature} must be above 0; DeiT has 1 to 3")
        if self.target == "hard" and self.temperature != 1:
            raise ConfigError(
                f'objective.temperature {self.temperature} changes no class, and target = "hard" takes the '
                'teacher\'s first; leave it out, or set objective.target = "soft"'
            )

    @property
    def is_timms(self) -> bool:
        return self.teacher.startswith(TIMM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """(1 - alpha) times the loss of the labels plus alpha times that of the teacher's logits.

    separate_heads: each has a head of its own; else both judge the same logits.
    """

    config: DistillationConfig
    loss_config: LossConfig
    augment: AugmentConfig
    num_classes: int
    separate_heads: bool
    teacher: Teaching

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        config = self.config
        pixels, targets = mixed(images, labels, self.augment, self.num_classes, key)
        taught = self.teacher(pixels)  # first: what it needs is free before the student's activations
        if self.separate_heads:
            logits, of_teacher = forward(pixels, separate_heads=True).unbind(1)  # [B, C] each
        else:
            logits = of_teacher = forward(pixels)
        base = compute_loss(self.loss_config, logits, targets)
        distilled = distillation_loss(config.target, of_teacher, taught, config.temperature)
        return (1 - config.alpha) * base + config.alpha * distilled
