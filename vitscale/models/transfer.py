"""Fine-tuning: which of a pretrained model's weights another model takes over, and how they are fitted."""

from torch import Tensor

from vitscale.config import ConfigError
from vitscale.models.posemb import resize_posemb
from vitscale.models.vit import ModelConfig

_SAME = (
    "resolved_width",
    "resolved_depth",
    "resolved_num_heads",
    "resolved_mlp_dim",
    "resolved_patch_size",
    "pool",
    "posemb",
)


def transfer_state(state: dict[str, Tensor], source: ModelConfig, target: ModelConfig) -> dict[str, Tensor]:
    """The backbone of `state` for a model of config `target`, position embeddings resized to its grid.

    The whole head, tanh layer and classifier, is left out: the target keeps its own zero-initialised one
    (paper, section 3.2). Raises ConfigError, naming the key, where the two are not the same backbone.
    """
    for name in (*_SAME, "gelu"):
        here, there = getattr(target, name), getattr(source, name)
        if here != there:
            key = name.removeprefix("resolved_")
            raise ConfigError(
                f"model.{key} is {here!r}, but the [init] checkpoint has {there!r}; set model.{key} = "
                f"{there!r}"
            )
    backbone = {
        name: tensor for name, tensor in state.items() if not name.startswith(("pre_logits.", "head."))
    }
    if "pos_embed" in backbone:
        backbone["pos_embed"] = resize_posemb(backbone["pos_embed"], source.grid, target.grid)
    return backbone
