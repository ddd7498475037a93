"""Fine-tuning: which weights a model takes over from a pretrained one, and how they fit."""

from torch import Tensor

from vitscale.errors import ConfigError
from vitscale.models.posemb import resize_posemb
from vitscale.models.vit import ViTConfig

# What two models must have in common to share a backbone.
_SAME = (
    "resolved_width",
    "resolved_depth",
    "resolved_num_heads",
    "resolved_mlp_dim",
    "resolved_patch_size",
    "pool",
    "num_registers",
    "posemb",
    "gelu",
)


def check_backbone(source: ViTConfig, target: ViTConfig) -> None:
    """Raise ConfigError, naming the key, unless the two models have the same backbone."""
    for name in _SAME:
        wanted, saved = getattr(target, name), getattr(source, name)
        if wanted != saved:
            key = name.removeprefix("resolved_")
            raise ConfigError(
                f"model.{key} is {wanted!r}, but the [init] checkpoint has {saved!r}; "
                f"set model.{key} = {saved!r}"
            )


def is_backbone(name: str) -> bool:
    """Whether a model takes this tensor over.

    The head, both tanh layer and classifier, is left out: the target keeps its own
    zero-initialised one (paper, section 3.2). So is what masked patch prediction alone needs.
    """
    return not name.startswith(("pre_logits.", "head.", "mask_token", "patch_head."))


def transferred(name: str, tensor: Tensor, source: ViTConfig, target: ViTConfig) -> Tensor:
    """A tensor of the backbone as the target has it: position embeddings fit its grid."""
    return resize_posemb(tensor, source.grid, target.grid) if name == "pos_embed" else tensor
