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
    "posemb",
    "gelu",
)


def transfer_state(state: dict[str, Tensor], source: ViTConfig, target: ViTConfig) -> dict[str, Tensor]:
    """The backbone of `state`, with position embeddings resized to the grid of `target`.

    The head, both tanh layer and classifier, is left out: the target keeps its own
    zero-initialised one (paper, section 3.2). Raises ConfigError, naming the key, where the
    two are not the same backbone.
    """
    for name in _SAME:
        wanted, saved = getattr(target, name), getattr(source, name)
        if wanted != saved:
            key = name.removeprefix("resolved_")
            raise ConfigError(
                f"model.{key} is {wanted!r}, but the [init] checkpoint has {saved!r}; "
                f"set model.{key} = {saved!r}"
            )
    backbone = {
        name: tensor for name, tensor in state.items() if not name.startswith(("pre_logits.", "head."))
    }
    if "pos_embed" in backbone:
        backbone["pos_embed"] = resize_posemb(backbone["pos_embed"], source.grid, target.grid)
    return backbone
