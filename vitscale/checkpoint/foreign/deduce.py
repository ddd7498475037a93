"""The configuration of a model from another library: from its tensors' names and shapes, and its config.json.

Whatever our models cannot compute is refused in one sentence that names the tensor or key: a tensor left out
in silence would make another model.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitscale import config as configs
from vitscale.checkpoint.foreign.configs import GOOGLES, TIMM_POOLS
from vitscale.config import ConfigError
from vitscale.models.names import (
    FLAX_DIALECTS,
    Dialect,
    Shapes,
    our_shapes,
    rules,
    single_names,
    their_shapes,
)
from vitscale.models.vit import VARIANTS, ModelConfig

logger = logging.getLogger(__name__)
Values = dict[str, int | float | str]

_GELUS = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
# What the name of a timm architecture implies, so that its config.json does not say it.
_TIMM_IMPLIED: dict[str, dict[str, object]] = {
    r"^vit_(base_patch32|large_patch16(?=.*_512)|so400m_patch16|giantopt_patch16)_siglip_": {
        "act_layer": "gelu_tanh"
    },
    r"quickgelu": {"act_layer": "quick_gelu"},
    r"^vit_(giantopt_patch16_siglip|base_patch16_gap)_": {"num_heads": 16},
}
# timm's arguments that put another layer in the place of ours.
_TIMM_LAYERS = ("norm_layer", "embed_layer", "embed_norm_layer", "mlp_layer", "attn_layer", "block_fn")

# What tensors of other architectures are, by patterns in their names.
_PARTS = {
    r"dist(illation)?_token|head_dist": "belongs to DeiT's distillation token",
    r"reg(ister)?_tokens?": "is of register tokens",
    r"(^|\.)(ls\d\.gamma|gamma_\d|layer_scale\d)": "is a layer scale",
    r"[qk]_norm|(query|key)_norm": "normalises queries and keys",
    r"fc_norm": "normalises after the pooling; vitscale's models do it before",
    r"norm_pre|pre_layrnorm": "normalises before the blocks",
    r"rel(ative)?_pos": "is of relative positions",
    r"mask_token|decoder": "is of masked image modelling",
    r"patch_embed\.backbone|(^|/)(conv_root|gn_root|resnet|block\d+/unit)": "is of a ResNet",
    r"head_drop|head\.mlp|head\.last_layer": "is of a projection head; leave it out of the file",
}


def model_config(
    dialect: Dialect, shapes: Shapes, theirs: Mapping[str, Any], overrides: Sequence[str]
) -> ModelConfig:
    """The configuration of the model whose tensors have `shapes` under the dialect's names.

    theirs: its config.json, empty if there is none. overrides: model.key=value, which win. Raises ConfigError
    for what our model cannot be, and for what the file does not say.
    """
    refuse_other_parts(shapes)
    try:
        values = _sizes(dialect, shapes)
    except (IndexError, ZeroDivisionError):
        raise ConfigError("the shapes of its tensors are not those of a ViT") from None
    values |= _EXTRAS[dialect](theirs, values) if dialect in _EXTRAS else GOOGLES
    if "num_heads" not in values:
        values["num_heads"] = _guess_heads(values, overrides)
    return filled(_with_variant(values), overrides)


def filled(values: Mapping[str, object], overrides: Sequence[str]) -> ModelConfig:
    """The model section of these plain values and overrides. Raises ConfigError for what it refuses."""
    named = [f"model.{key}={json.dumps(value)}" for key, value in values.items()]
    return configs.load(_Model, (), [*named, *overrides]).model


def check_tensors(dialect: Dialect, config: ModelConfig, shapes: Shapes) -> None:
    """Raise ConfigError unless these are exactly the tensors of the model, no more and no fewer."""
    expected, ours = their_shapes(dialect, config), our_shapes(config)
    if any(name not in ours for rule in rules(dialect, config) for name in rule.ours):
        raise ConfigError(
            f"model.posemb {config.posemb!r} must be 'learned': the file has position embeddings"
        )
    for name in shapes:
        if name not in expected:
            raise ConfigError(
                f"{name} has no place in a ViT of vitscale; leave it out of the file if it can go"
            )
    for name, shape in expected.items():
        if name not in shapes:
            raise ConfigError(f"there is no {name}, which a ViT of vitscale has {shape}")
        if shapes[name] != shape:
            raise ConfigError(
                f"{name} is {shapes[name]}, but {shape} in the model that the other tensors describe"
            )


def refuse_other_parts(names: Iterable[str]) -> None:
    """Raise ConfigError for the first tensor that is known to belong to an architecture that is not ours."""
    for name in names:
        for pattern, meaning in _PARTS.items():
            if re.search(pattern, name):
                raise ConfigError(f"{name} {meaning}: this model cannot be imported")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    model: ModelConfig


def _sizes(dialect: Dialect, shapes: Shapes) -> Values:
    """What the shapes say."""
    names = single_names(dialect)

    def shape(ours: str) -> tuple[int, ...]:
        if names[ours] not in shapes:
            raise ConfigError(f"there is no {names[ours]}: these are not all the weights of a ViT")
        return shapes[names[ours]]

    def length(ours: str) -> int:
        """Of a vector; 0 where there is none."""
        return shape(ours)[0] if names.get(ours) in shapes else 0

    has_probe, has_token = (names.get(ours) in shapes for ours in ("attn_pool.probe", "cls_token"))
    width, pool = shape("patch_embed.proj.bias")[0], "map" if has_probe else "token" if has_token else "mean"
    values: Values = {
        "width": width,
        "mlp_dim": shape("blocks.0.mlp.fc1.bias")[0],
        "depth": _count_blocks(names["blocks.0.mlp.fc1.bias"], shapes),
        "patch_size": math.isqrt(math.prod(shape("patch_embed.proj.weight")) // (3 * width)),
        "num_classes": length("head.bias"),
        "representation_size": length("pre_logits.bias"),
        "pool": pool,
    }
    if dialect in FLAX_DIALECTS:
        values["num_heads"] = shape("blocks.0.attn.proj.weight")[0]
    if dialect == "big_vision" and names["pos_embed"] not in shapes:
        logger.warning("no position embedding: taken as sincos2d; give model.image_size=N if it is not 224")
        return values | {"posemb": "sincos2d"}
    num_patches = shape("pos_embed")[1] - (pool == "token" and dialect != "big_vision")
    return values | {"image_size": values["patch_size"] * _side(num_patches, names["pos_embed"])}


def _count_blocks(first: str, shapes: Shapes) -> int:
    """How many blocks there are, by the name of a tensor of block 0, whose first digit is that 0."""
    before, _, after = first.partition("0")
    number = 0
    while f"{before}{number}{after}" in shapes:
        number += 1
    return number


def _side(num_patches: int, name: str) -> int:
    side = math.isqrt(max(0, num_patches))
    if side * side != num_patches:
        raise ConfigError(
            f"{name} is for {num_patches} patches, which are no square grid: vitscale takes square images"
        )
    return side


def _timm_extras(theirs: Mapping[str, Any], values: Values) -> Values:
    arguments: dict[str, Any] = {}
    for pattern, implied in _TIMM_IMPLIED.items():
        if re.search(pattern, str(theirs.get("architecture", ""))):
            arguments |= implied
    arguments |= theirs.get("model_args") or {}
    layer = next((key for key in _TIMM_LAYERS if arguments.get(key)), None)
    if layer:
        raise ConfigError(f"config.json has {layer} {arguments[layer]!r}: this model cannot be imported")
    expected = TIMM_POOLS[str(values["pool"])]
    pool = arguments.get("global_pool", theirs.get("global_pool", expected))
    if pool != expected:
        raise ConfigError(f"config.json has global_pool {pool!r}, but the tensors are those of {expected!r}")
    found = {"gelu": _gelu("act_layer", arguments.get("act_layer") or "gelu"), "norm_eps": 1e-6}
    return found | ({"num_heads": arguments["num_heads"]} if "num_heads" in arguments else {})


def _transformers_extras(theirs: Mapping[str, Any], values: Values) -> Values:
    """The defaults are those of transformers' ViTConfig."""
    if not theirs:
        raise ConfigError("config.json is missing beside the weights; the number of heads stands only there")
    if theirs.get("model_type") != "vit":
        raise ConfigError(
            f'config.json has model_type {theirs.get("model_type")!r}; only "vit" can be imported'
        )
    if values["representation_size"] and values["num_classes"]:
        raise ConfigError(
            "vit.pooler.dense stands beside a classifier, and transformers never uses both; leave one of "
            "them out of the file"
        )
    if values["representation_size"] and theirs.get("pooler_act", "tanh") != "tanh":
        raise ConfigError(f"config.json has pooler_act {theirs['pooler_act']!r}; vitscale's models have tanh")
    return {
        "num_heads": theirs.get("num_attention_heads", 12),
        "gelu": _gelu("hidden_act", theirs.get("hidden_act", "gelu")),
        "norm_eps": theirs.get("layer_norm_eps", 1e-12),
        "dropout": theirs.get("hidden_dropout_prob", 0.0),
    }


_EXTRAS = {"timm": _timm_extras, "transformers": _transformers_extras}


def _gelu(key: str, value: str) -> str:
    if not isinstance(value, str) or value not in _GELUS:
        raise ConfigError(f"config.json has {key} {value!r}; vitscale's models have {' or '.join(_GELUS)}")
    return _GELUS[value]


def _guess_heads(values: Values, overrides: Sequence[str]) -> int:
    """Those of the variant of the same sizes, else heads of 64."""
    sizes = (values["width"], values["depth"], values["mlp_dim"])
    known = [v.num_heads for v in VARIANTS.values() if (v.width, v.depth, v.mlp_dim) == sizes]
    heads = known[0] if known else max(1, int(values["width"]) // 64)
    if not any(override.startswith("model.num_heads=") for override in overrides):
        logger.warning("the file does not say how many heads there are: taken as %d (model.num_heads)", heads)
    return heads


def _with_variant(values: Values) -> Values:
    """The same with its sizes as one of our variants, if there is one of them."""
    sizes = {key: values[key] for key in ("width", "depth", "mlp_dim", "num_heads")}
    named = [name for name, variant in VARIANTS.items() if dataclasses.asdict(variant) == sizes]
    rest = {key: value for key, value in values.items() if key not in (*sizes, "patch_size")}
    if named:
        return {"variant": f"{named[0]}/{values['patch_size']}", **rest}
    return {"variant": f"B/{values['patch_size']}", **sizes, **rest}
