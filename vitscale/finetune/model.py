"""The model of a fine-tuning: the checkpoint's, for other images and with another head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vitscale.image_size import whole_patches
from vitscale.models import ModelConfig
from vitscale.models.vit_config import ViTConfig

# What a fine-tuning sets; the rest is the checkpoint's.
KEYS = (
    "image_size",
    "num_classes",
    "num_patch_outputs",
    "representation_size",
    "head_bias",
    "dropout",
    "drop_path",
)


def tuned_model(model: ModelConfig, values: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint with `values` of KEYS, as far as its kind has them.

    Those that `values` lacks take their default, which leaves the part out. The images of a
    ViT are rounded down to whole patches, as Google's convolution without padding does: of
    384 px, patches of 14 px use 378. Raises ConfigError for what the model cannot be.
    """
    fields = [field for field in dataclasses.fields(model) if field.name in KEYS]
    changes = {field.name: values.get(field.name, field.default) for field in fields}
    if isinstance(model, ViTConfig):
        changes["image_size"] = whole_patches(changes["image_size"], model.resolved_patch_size)
    return dataclasses.replace(model, **changes)
