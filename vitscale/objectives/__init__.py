"""What a training step minimises ([objective]): from a micro batch and a model to a loss.

An objective knows neither engine nor ranks: it calls the forward pass that it is given, once,
and its randomness depends on where the micro batch is in the run, not on who computes it.
To add a kind: write its config and its Objective in a file of their own, name the config in
ObjectiveConfig, and build the objective in build_objective.
"""

from vitscale.data.transforms import AugmentConfig
from vitscale.models import ModelConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives.classification import Classification, ClassificationConfig
from vitscale.objectives.distillation import Distillation, DistillationConfig, Teaching
from vitscale.objectives.losses import LossConfig
from vitscale.objectives.masked_patches import MaskedPatches, MaskedPatchesConfig
from vitscale.objectives.objective import Objective

# [objective]: the first is the default.
ObjectiveConfig = ClassificationConfig | MaskedPatchesConfig | DistillationConfig


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
