"""What a training step minimises ([objective]): from a micro batch and a model to a loss.

An objective knows neither engine nor ranks: it calls the forward pass that it is given, once,
and its randomness depends on where the micro batch is in the run, not on who computes it.
To add a kind: write its config and its Objective here, name the config in ObjectiveConfig,
and build the objective in build_objective.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.config import check_choices
from vitscale.data.transforms import AugmentConfig, normalize
from vitscale.errors import ConfigError
from vitscale.losses import DistillationTarget, LossConfig, compute_loss, distillation_loss, to_targets
from vitscale.mixup import mix
from vitscale.models import ModelConfig
from vitscale.models.corruption import Corruption, draw_corruption
from vitscale.models.layers import to_patches
from vitscale.models.vit_config import ViTConfig

COLORS = 512  # of 3 bits for each of three channels
DOWNSIZED = 4  # side in pixels of a downsized patch
TIMM = "timm:"  # before the name of a teacher that timm has
Teaching = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B C"]]  # pixels in [-1, 1] to logits


@runtime_checkable
class Forward(Protocol):
    """From fp32 pixels to logits [B, C]; it casts to the engine's dtype itself.

    With a corruption, to the outputs of the patch head for the corrupted patches [B, k, X];
    with separate_heads, to the logits of a distilled model's two heads [B, 2, C].
    """

    def __call__(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        /,
        *,
        corruption: Corruption | None = None,
        separate_heads: bool = False,
    ) -> Float[Tensor, "B *rest"]: ...


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

    def __post_init__(self) -> None:
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPatchesConfig:
    """Predict corrupted patches, without labels ([objective] with kind = "masked_patches").

    Masked patch prediction of the ViT paper (appendix B.1.2): BERT's objective for images.

    target:     what is predicted of a patch, and by how many outputs (model.num_patch_outputs):
                "mean_color", as one of 512 colours; "downsized_patch", the patch at 4 x 4
                pixels of such colours, 16 * 512 outputs; "regression", all its values in
                [-1, 1], by their squared error, 3 P^2 outputs with a patch size P
    corrupted:  the share of each image's patches that are corrupted, and predicted
    masked:     of these, the share whose embedding is replaced by a learned one
    replaced:   of these, the share whose embedding is replaced by that of another patch of the
                image; the rest stay as they are
    """

    kind: Literal["masked_patches"] = "masked_patches"
    target: Literal["mean_color", "downsized_patch", "regression"] = "mean_color"
    corrupted: float = 0.5
    masked: float = 0.8
    replaced: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.corrupted <= 1:
            raise ConfigError(f"objective.corrupted {self.corrupted} must lie in (0, 1]; the paper has 0.5")
        if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1:
            raise ConfigError(
                f"objective.masked {self.masked} and objective.replaced {self.replaced} must not be "
                "negative, nor above 1 together; the paper has 0.8 and 0.1"
            )

    def num_outputs(self, patch_size: int) -> int:
        """Outputs of the patch head for each patch."""
        outputs = {
            "mean_color": COLORS,
            "downsized_patch": DOWNSIZED**2 * COLORS,
            "regression": 3 * patch_size**2,
        }
        return outputs[self.target]

    def num_corrupted(self, num_patches: int) -> int:
        """How many patches of an image are corrupted: as many of each, and at least one."""
        return max(1, round(self.corrupted * num_patches))


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


# [objective]: the first is the default.
ObjectiveConfig = ClassificationConfig | MaskedPatchesConfig | DistillationConfig


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
        pixels, targets = _mixed(images, labels, self.augment, self.num_classes, key)
        return compute_loss(self.loss_config, forward(pixels), targets)


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
        pixels, targets = _mixed(images, labels, self.augment, self.num_classes, key)
        taught = self.teacher(pixels)  # first: what it needs is free before the student's activations
        if self.separate_heads:
            logits, of_teacher = forward(pixels, separate_heads=True).unbind(1)  # [B, C] each
        else:
            logits = of_teacher = forward(pixels)
        base = compute_loss(self.loss_config, logits, targets)
        distilled = distillation_loss(config.target, of_teacher, taught, config.temperature)
        return (1 - config.alpha) * base + config.alpha * distilled


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPatches:
    """Cross-entropy of the colours, or squared error of the values, of the corrupted patches.

    It is the mean over all that is predicted. The images have equally many corrupted patches,
    so it is also the mean of the images' losses, however the global batch is cut.
    """

    config: MaskedPatchesConfig
    patch_size: int

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        config, pixels = self.config, normalize(images, torch.float32)
        num_patches = math.prod(images.shape[2:]) // self.patch_size**2
        drawn = draw_corruption(
            num_patches,
            config.num_corrupted(num_patches),
            masked=config.masked,
            replaced=config.replaced,
            count=len(images),
            **key._asdict(),
        )
        # With non_blocking torch does not wait; CUDA may, to stage what is not pinned.
        corruption = Corruption(*(part.to(images.device, non_blocking=True) for part in drawn))
        outputs = forward(pixels, corruption=corruption).float()  # [B, k, X]
        rows = torch.arange(len(images), device=images.device)[:, None]  # [B, 1]
        if config.target == "regression":
            values = to_patches(pixels, self.patch_size)[rows, corruption.corrupted]  # [B, k, X]
            return F.mse_loss(outputs, values)
        side = DOWNSIZED if config.target == "downsized_patch" else 1
        colors = patch_colors(images, self.patch_size, side)[rows, corruption.corrupted]  # [B, k, s^2]
        return F.cross_entropy(outputs.reshape(-1, COLORS), colors.flatten())


def _mixed(
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


def patch_colors(images: UInt8[Tensor, "B 3 H W"], patch_size: int, side: int) -> Int64[Tensor, "B n cells"]:
    """The colour of each patch at side x side pixels, row by row, as one of 512.

    A channel's mean m in [0, 1] falls into bin min(7, floor(8 m)), and the colour is

        red bin + 8 * green bin + 64 * blue bin

    in integers, so that every device agrees on the bin of a mean on an edge.
    """
    size = patch_size // side
    patches = to_patches(images.long(), patch_size)  # [B, n, 3 P P]
    cells = patches.unflatten(-1, (3, side, size, side, size)).sum((-3, -1))  # [B, n, 3, s, s]
    bins = (8 * cells // (255 * size**2)).clamp(max=7)
    red, green, blue = bins.flatten(-2).unbind(2)  # [B, n, s^2] each
    return red + 8 * green + 64 * blue


def build_objective(
    config: ObjectiveConfig,
    *,
    loss: LossConfig,
    augment: AugmentConfig,
    model: ModelConfig,
    teacher: Teaching | None = None,
) -> Objective:
    """The objective of a config. loss, augment: the sections that classification also reads.

    teacher: of a distillation.
    """
    match config:
        case ClassificationConfig():
            return Classification(loss_config=loss, augment=augment, num_classes=model.num_classes)
        case MaskedPatchesConfig():
            assert isinstance(model, ViTConfig), "TrainConfig refuses the others"
            return MaskedPatches(config=config, patch_size=model.resolved_patch_size)
        case DistillationConfig():
            assert teacher is not None, "a distillation has a teacher"
            return Distillation(
                config=config,
                loss_config=loss,
                augment=augment,
                num_classes=model.num_classes,
                separate_heads=isinstance(model, ViTConfig) and model.distilled,
                teacher=teacher,
            )
