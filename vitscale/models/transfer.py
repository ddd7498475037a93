"""Fine-tuning: which weights a model takes over from a pretrained one, and how they fit."""

from typing import Any

from torch import Tensor

from vitscale import toml
from vitscale.errors import ConfigError
from vitscale.image_size import written
from vitscale.models import ModelConfig
from vitscale.models.model import CommonConfig
from vitscale.models.posemb import resize_axis, resize_posemb
from vitscale.models.vit_config import ViTConfig

_VIT = (
    "resolved_width",
    "attention",
    "resolved_depth",
    "resolved_num_heads",
    "resolved_mlp_dim",
    "resolved_patch_size",
    "pool",
    "num_registers",
    "distilled",
    "posemb",
    "posemb_at",
    "gelu",
    "norm_eps",
)
# What two models of a kind must have in common to share a backbone.
_SAME = {
    "vit": _VIT,
    "hybrid": ("resolved_stem_width", "resolved_stem_stages", *_VIT),
    "resnet": ("resolved_width", "resolved_stages"),
}


def backbone_of(config: CommonConfig) -> dict[str, Any]:
    """The kind of a model and the keys of [model] that its backbone follows from, resolved.

    With these and its tensors, a model has the same features at the same image size.
    """
    values = {"kind": config.kind}
    values |= {name.removeprefix("resolved_"): getattr(config, name) for name in _SAME[config.kind]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def check_backbone(source: ModelConfig, target: ModelConfig) -> None:
    """Raise ConfigError, naming the key, unless the two models have the same backbone."""
    saved = backbone_of(source)
    for key, wanted in backbone_of(target).items():
        if wanted != saved[key]:  # the kind first, which says what other keys there are
            raise ConfigError(
                f"model.{key} is {toml.value(wanted)}, but the [init] checkpoint has "
                f"{toml.value(saved[key])}; set model.{key} = {toml.value(saved[key])}"
            )
    if not isinstance(source, ViTConfig) or not isinstance(target, ViTConfig) or source.posemb != "relative":
        return
    if source.grid != target.grid:
        raise ConfigError(
            f"model.image_size {written(target.image_size)} makes another grid of patches than the [init] "
            'checkpoint has, whose "relative" position embeddings are of offsets in raster order, without a '
            f"meaning there; set model.image_size = {written(source.image_size)}"
        )


def check_head(source: ModelConfig, target: ModelConfig) -> None:
    """Raise ConfigError, naming the key, unless two models of one backbone have like heads."""
    for name in ("num_classes", "representation_size"):
        wanted, saved = getattr(target, name, 0), getattr(source, name, 0)
        if wanted != saved:
            raise ConfigError(
                f"model.{name} is {wanted}, but the [init] checkpoint, whose head init.head takes along, has "
                f"{saved}; leave out init.head for a new one, or set model.{name} = {saved}"
            )


def is_backbone(name: str) -> bool:
    """Whether a model takes this tensor over.

    The head, both tanh layer and classifier, is left out: the target keeps its own
    zero-initialised one (paper, section 3.2). So is what masked patch prediction alone needs.
    """
    return not is_head(name) and not name.startswith(("mask_token", "patch_head."))


def is_head(name: str) -> bool:
    """Whether a tensor is of the head, which a model takes over only if it is asked to."""
    return name.startswith(("pre_logits.", "head.", "head_dist."))


def transferred(name: str, tensor: Tensor, source: ModelConfig, target: ModelConfig) -> Tensor:
    """A tensor of the backbone as the target has it: position embeddings fit its grid."""
    match name:
        case "pos_embed":
            return resize_posemb(tensor, source.grid, target.grid)
        case "pos_embed_x":
            return resize_axis(tensor, target.grid[1])
        case "pos_embed_y":
            return resize_axis(tensor, target.grid[0])
    return tensor
