"""What config.json of other libraries says of a model that the shapes of its tensors do not."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from vitscale.errors import CheckpointError
from vitscale.image_size import ImageSize, image_size, sides
from vitscale.models.names import Dialect
from vitscale.weights.foreign.configs import TIMM_POOLS

Values = dict[str, Any]

_GELUS = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
# What the name of a timm architecture implies, by patterns: its config.json does not repeat it.
_TIMM_IMPLIED: dict[str, dict[str, object]] = {
    r"^vit_(base_patch32|large_patch16(?=.*_512)|so400m_patch16|giantopt_patch16)_siglip_": {
        "act_layer": "gelu_tanh"
    },
    r"quickgelu": {"act_layer": "quick_gelu"},
    r"^vit_(giantopt_patch16_siglip|base_patch16_gap)_": {"num_heads": 16},
}
# timm's arguments that replace one of our layers by another.
_TIMM_LAYERS = ("norm_layer", "embed_layer", "embed_norm_layer", "mlp_layer", "attn_layer", "block_fn")


def _timm_extras(config_json: Mapping[str, Any], values: Values) -> Values:
    """The keys of [model] that the shapes do not say, from timm's config.json."""
    arguments: dict[str, Any] = {}
    for pattern, implied in _TIMM_IMPLIED.items():
        if re.search(pattern, str(config_json.get("architecture", ""))):
            arguments |= implied
    arguments |= config_json.get("model_args") or {}
    layer = next((key for key in _TIMM_LAYERS if arguments.get(key)), None)
    if layer:
        raise CheckpointError(f"config.json has {layer} {arguments[layer]!r}: this model cannot be imported")
    expected = TIMM_POOLS[str(values["pool"])]
    pool = arguments.get("global_pool", config_json.get("global_pool", expected))
    if pool != expected:
        raise CheckpointError(
            f"config.json has global_pool {pool!r}, but the tensors are those of {expected!r}"
        )
    extras: Values = {"norm_eps": 1e-6}
    act = arguments.get("act_layer") or ("gelu" if config_json.get("architecture") else None)
    if act or values["pool"] == "token":  # of timm's ViTs without a class token, some have the other GELU
        extras["gelu"] = _gelu("act_layer", act or "gelu")
    return extras | ({"num_heads": arguments["num_heads"]} if "num_heads" in arguments else {})


def _transformers_extras(config_json: Mapping[str, Any], values: Values) -> Values:
    """The same from transformers', with the defaults of its ViTConfig."""
    if not config_json:
        raise CheckpointError("config.json is missing beside the weights; only it says the number of heads")
    if values["representation_size"] and values["num_classes"]:
        raise CheckpointError(
            "the file has both vit.pooler.dense and a classifier, and transformers never uses both; leave "
            "one of them out of it"
        )
    if values["representation_size"] and config_json.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(
            f"config.json has pooler_act {config_json['pooler_act']!r}; vitscale's models have tanh"
        )
    return {
        "num_heads": config_json.get("num_attention_heads", 12),
        "gelu": _gelu("hidden_act", config_json.get("hidden_act", "gelu")),
        "norm_eps": config_json.get("layer_norm_eps", 1e-12),
        "dropout": config_json.get("hidden_dropout_prob", 0.0),
    }


# By dialect, what [model] takes from config.json, given the keys that follow from the shapes.
EXTRAS: dict[str, Callable[[Mapping[str, Any], Values], Values]] = {
    "timm": _timm_extras,
    "transformers": _transformers_extras,
}


def _gelu(key: str, value: str) -> str:
    if not isinstance(value, str) or value not in _GELUS:
        raise CheckpointError(
            f"config.json has {key} {value!r}; vitscale's models have {' or '.join(_GELUS)}"
        )
    return _GELUS[value]


def stated_size(dialect: Dialect, config_json: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The key of the image size, and its value, as it stands; None if there is none.

    Position embeddings say how many patches there are, but in how many rows only of a square.
    """
    if dialect == "transformers":
        return "image_size", config_json.get("image_size", 224)
    if dialect != "timm":
        return None
    size = (config_json.get("model_args") or {}).get("img_size")
    if size is not None:
        return "img_size", size
    # timm's models of a square size take others: only another shape says something.
    input_size = (config_json.get("pretrained_cfg") or {}).get("input_size")
    if isinstance(input_size, list) and len(set(map(str, input_size[1:]))) > 1:
        return "input_size", input_size[1:]
    return None


def parsed_size(value: Any) -> ImageSize | None:
    """What config.json states as a size; None if it is none."""
    height_width = value if isinstance(value, list) else [value, value]
    if len(height_width) != 2 or not all(type(side) is int and side > 0 for side in height_width):
        return None
    return image_size(*height_width)


def patches_of(size: ImageSize, patch_size: int) -> int:
    """Patches of an image; 0 if its sides are not multiples of a patch's."""
    height, width = sides(size)
    fits = patch_size > 0 and not height % patch_size and not width % patch_size
    return (height // patch_size) * (width // patch_size) if fits else 0
