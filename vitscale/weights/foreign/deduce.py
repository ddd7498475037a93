"""Deduces the configuration of another library's model from its tensors and its config.json.

Whatever our models cannot compute is refused in a sentence that names the tensor or key: an
import that left it out would be a different model.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitscale import config as configs
from vitscale.errors import CheckpointError, ConfigError
from vitscale.image_size import ImageSize, sides
from vitscale.models import ModelConfig
from vitscale.models.hybrid import STEMS, Stem, stem_stride
from vitscale.models.names import (
    BIT_ROOT,
    DIALECTS_OF,
    FLAX_DIALECTS,
    STEM_ROOTS,
    Dialect,
    one_to_one_names,
    their_shapes,
)
from vitscale.models.resnet import MAX_STAGES, ROOT_WIDTH, STAGES
from vitscale.models.vit_config import VARIANTS, Pool, Variant, ViTConfig
from vitscale.weights.files import Shapes
from vitscale.weights.foreign.config_json import EXTRAS, parsed_size, patches_of, stated_size
from vitscale.weights.foreign.configs import GOOGLE_DEFAULTS

logger = logging.getLogger(__name__)
Values = dict[str, Any]

# By dialect, a tensor of each block of a ResNet, and the number of the first one.
_UNITS: dict[Dialect, tuple[str, int]] = {
    "timm": ("patch_embed.backbone.stages.{stage}.blocks.{unit}.conv1.weight", 0),
    "original": ("block{stage}/unit{unit}/conv1/kernel", 1),
    "linen": ("block{stage}/unit{unit}/conv1/kernel", 1),
    "bit": ("resnet/block{stage}/unit{unit:02d}/a/standardized_conv2d/kernel", 1),
}

_VARIANT_KEYS = tuple(field.name for field in dataclasses.fields(Variant))

# Tensors of other architectures, by patterns in their names.
_OTHER_ARCHITECTURES = {
    r"(^|\.)(ls\d\.gamma|gamma_\d|layer_scale\d)": "is a layer scale",
    r"[qk]_norm|(query|key)_norm": "normalises queries and keys",
    r"mlp\.(w12|weights_in)\.": "belongs to a gated MLP (SwiGLU)",
    r"fc_norm": "normalises after the pooling; vitscale's models do so before it",
    r"norm_pre|pre_layrnorm": "normalises before the blocks",
    r"rel(ative)?_pos": "belongs to relative positions",
    r"mask_token|decoder": "belongs to masked image modelling",
    r"patch_embed\.backbone\.(?!(stem\.)?(conv|norm)\.|stages\.\d+\.blocks\.)|(^|/)resnet/": (
        "belongs to another ResNet than a hybrid has"
    ),
    r"head_drop|head\.mlp|head\.last_layer": "belongs to a projection head; leave it out of the file",
    r"(^|\.)vision_model\.": "is of SigLIP or CLIP in transformers; timm has SigLIP in another form",
    r"^(data2vec_vision|beit)\.": "is BEiT's, which has relative positions and a layer scale",
}


def deduce_config(
    dialect: Dialect, shapes: Shapes, config_json: Mapping[str, Any], overrides: Sequence[str]
) -> ModelConfig:
    """The configuration of the model whose tensors have `shapes` under the dialect's names.

    config_json: empty if there is none. overrides: model.key=value, which come last. Raises
    CheckpointError for what our models cannot be, and ConfigError for what [model] refuses.
    """
    if dialect == "bit":
        return build_config(_bit_values(shapes), overrides)
    refuse_other_architectures(shapes)
    given = _given_size(overrides) or _stated_size(dialect, config_json)
    try:
        values = _shape_values(_Tensors(dialect, shapes), given)
    except (IndexError, ZeroDivisionError):
        raise CheckpointError("the shapes of its tensors are not those of a ViT or hybrid") from None
    values |= EXTRAS[dialect](config_json, values) if dialect in EXTRAS else GOOGLE_DEFAULTS
    _check_image_size(dialect, config_json, values)
    if "gelu" not in values:
        _ask("gelu", '"tanh" or "exact": such models of timm have either', overrides)
    if "num_heads" not in values:
        values["num_heads"] = _num_heads(values, config_json, overrides)
    return build_config(_with_variant(values), overrides)


def build_config(values: Mapping[str, object], overrides: Sequence[str]) -> ModelConfig:
    """The model section of values and overrides. Raises ConfigError if it refuses them."""
    settings = [f"model.{key}={json.dumps(value)}" for key, value in values.items()]
    return configs.load(_Sections, (), [*settings, *overrides]).model


def check_tensors(dialect: Dialect, config: ModelConfig, shapes: Shapes) -> None:
    """Raise CheckpointError unless these are exactly the tensors of the model."""
    if config.num_blocks > len(shapes):  # counted first: the table of a hostile depth never ends
        raise CheckpointError(f"model.depth is {config.num_blocks:,}, but there are {len(shapes)} tensors")
    if dialect not in DIALECTS_OF[config.kind]:
        raise CheckpointError(
            f"model.kind is {config.kind!r}, but the tensors have names of a "
            f"{'ResNet' if dialect == 'bit' else 'ViT'}"
        )
    if isinstance(config, ViTConfig) and dialect != "vitscale":
        _check_vit_keys(dialect, config)
    expected = their_shapes(dialect, config)
    kind = {"vit": "ViT", "hybrid": "hybrid", "resnet": "ResNet"}[config.kind]
    for name in shapes:
        if name not in expected:
            raise CheckpointError(
                f"{name} has no place in a {kind} of vitscale; leave it out of the file if it is not needed"
            )
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"there is no {name}, which is {shape} in a {kind} of vitscale")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{name} is {shapes[name]}, but {shape} in the model that the other tensors describe"
            )


def _check_vit_keys(dialect: Dialect, config: ViTConfig) -> None:
    """Raise ConfigError for keys of [model] with which the dialect has no models."""
    keys: dict[str, tuple[object, ...]] = {
        "attention": ("global",),
        "posemb": ("learned", "sincos2d") if dialect == "big_vision" else ("learned",),
        "posemb_at": ("input",),
        "num_patch_outputs": (0,),
    }
    if dialect == "transformers":
        keys["pool"] = ("token",)
    if dialect in FLAX_DIALECTS:
        keys |= {"num_registers": (0,), "distilled": (False,)}
    for key, allowed in keys.items():
        if (value := getattr(config, key)) not in allowed:
            raise ConfigError(
                f"model.{key} {value!r} must be {allowed[0]!r}: models of {dialect} have no other"
            )


def refuse_other_architectures(names: Iterable[str]) -> None:
    """Raise CheckpointError for the first tensor known to belong to another architecture."""
    for name in names:
        for pattern, meaning in _OTHER_ARCHITECTURES.items():
            if re.search(pattern, name):
                raise CheckpointError(f"{name} {meaning}: this model cannot be imported")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sections:
    model: ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GivenSize:
    image_size: ImageSize = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GivenSections:
    model: _GivenSize = dataclasses.field(default_factory=_GivenSize)


def _given_size(overrides: Sequence[str]) -> ImageSize:
    """model.image_size of the overrides; 0 if none has it."""
    given = [override for override in overrides if override.startswith("model.image_size=")]
    return configs.load(_GivenSections, (), given).model.image_size


def _stated_size(dialect: Dialect, config_json: Mapping[str, Any]) -> ImageSize:
    """The image size of config.json; 0 if it has none."""
    stated = stated_size(dialect, config_json)
    return (parsed_size(stated[1]) if stated else None) or 0


class _Tensors:
    """The shapes of a dialect's tensors by our names, where both keep a tensor as one."""

    def __init__(self, dialect: Dialect, shapes: Shapes) -> None:
        names = one_to_one_names(dialect, distilled=True)
        self.distilled = names.get("dist_token") in shapes
        self.names = names if self.distilled else one_to_one_names(dialect)
        self.dialect: Dialect = dialect
        self.shapes = shapes

    def has(self, ours: str) -> bool:
        return self.names.get(ours) in self.shapes

    def shape(self, ours: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is no such tensor."""
        if not self.has(ours):
            raise CheckpointError(f"there is no {self.names[ours]}: these are not all the weights of a ViT")
        return self.shapes[self.names[ours]]

    def length(self, ours: str) -> int:
        """Of a vector; 0 if there is none."""
        return self.shape(ours)[0] if self.has(ours) else 0


def _shape_values(tensors: _Tensors, given: ImageSize) -> Values:
    """The keys of [model] that follow from the shapes. given: the image size; 0 = unknown.

    Raises CheckpointError for what is missing or does not fit, and IndexError or
    ZeroDivisionError for tensors of fewer axes, or of no elements, where a ViT has some.
    """
    values: Values = {
        **_patch_values(tensors),
        "depth": _count_blocks(tensors.names["blocks.0.mlp.fc1.bias"], tensors.shapes),
        "mlp_dim": tensors.shape("blocks.0.mlp.fc1.bias")[0],
        "num_classes": tensors.length("head.bias"),
        "num_registers": tensors.shape("reg_token")[1] if tensors.has("reg_token") else 0,
        "representation_size": tensors.length("pre_logits.bias"),
        "pool": _pool(tensors),
    }
    if tensors.distilled:
        values["distilled"] = True
    if tensors.dialect in FLAX_DIALECTS:
        values["num_heads"] = tensors.shape("blocks.0.attn.proj.weight")[0]
    return values | _position_values(tensors, values, given)


def _pool(tensors: _Tensors) -> Pool:
    if tensors.has("attn_pool.probe"):
        return "map"
    return "token" if tensors.has("cls_token") else "mean"


def _patch_values(tensors: _Tensors) -> Values:
    """The keys of [model] of the patch embedding, and of its stem, if it has one."""
    name = tensors.names["patch_embed.proj.weight"]
    kernel, width = tensors.shape("patch_embed.proj.weight"), tensors.shape("patch_embed.proj.bias")[0]
    stem = _stem_values(tensors.dialect, tensors.shapes)
    channels = 3
    if len(kernel) == 4:  # ours is a linear layer, [D, C P P], which does not say C
        channels = kernel[2 if tensors.dialect in FLAX_DIALECTS else 1]
    if not stem:
        _check_channels(name, channels)
    stride = stem_stride(stem["stem_stages"]) if stem else 1
    side = math.isqrt(math.prod(kernel) // (channels * width))  # places to a side of a patch
    return {**stem, "width": width, "patch_size": stride * side}


def _position_values(tensors: _Tensors, values: Values, given: ImageSize) -> Values:
    """The keys of [model] that follow from the position embeddings, or from their absence."""
    name = tensors.names["pos_embed"]
    if tensors.dialect == "big_vision" and not tensors.has("pos_embed"):
        logger.warning("no position embedding: assuming sincos2d; give model.image_size=N if it is not 224")
        return {"posemb": "sincos2d"}
    num_patches = tensors.shape("pos_embed")[1] - tensors.distilled
    if values["pool"] == "token" and tensors.dialect != "big_vision":
        num_patches -= 1  # the class token's position
    return {"image_size": _image_size(num_patches, values["patch_size"], name, given)}


def _stem_values(dialect: Dialect, shapes: Shapes) -> Values:
    """The keys of [model] that only a hybrid has, and its kind; empty if there is no stem."""
    root = next((name for name in STEM_ROOTS.get(dialect, ()) if name in shapes), None)
    if root is None:
        return {}
    outputs, inputs = (0, 1) if dialect == "timm" else (3, 2)
    _check_channels(root, shapes[root][inputs])
    return {"kind": "hybrid", "stem_width": shapes[root][outputs], "stem_stages": _stages(dialect, shapes)}


def _bit_values(shapes: Shapes) -> dict[str, object]:
    """[model] of a ResNet with BiT's names. Its image size is in no file, and it takes any."""
    stages = _stages("bit", shapes)
    root, bias = shapes[BIT_ROOT], shapes.get("resnet/head/conv2d/bias", (0,))
    if len(root) != 4 or len(bias) != 1 or not stages:
        raise CheckpointError("the shapes of its tensors are not those of a BiT ResNet")
    _check_channels(BIT_ROOT, root[2])
    values: dict[str, object] = {"kind": "resnet", "num_classes": bias[0]}
    depth = next((depth for depth, known in STAGES.items() if known == tuple(stages)), 0)
    factor, rest = divmod(root[3], ROOT_WIDTH)
    if depth and factor and not rest:
        return values | {"variant": f"R{depth}x{factor}"}
    return values | {"width": root[3], "stages": stages}


def _stages(dialect: Dialect, shapes: Shapes) -> list[int]:
    """The number of blocks of each stage of a ResNet; of the first ones, if it has too many."""
    name, first = _UNITS[dialect]
    stages: list[int] = []
    while len(stages) <= MAX_STAGES:  # one too many is enough to be refused
        blocks = 0
        while name.format(stage=first + len(stages), unit=first + blocks) in shapes:
            blocks += 1
        if not blocks:
            break
        stages.append(blocks)
    return stages


def _check_channels(name: str, channels: int) -> None:
    if channels != 3:
        way_out = "; repeat it for the three, divided by 3" if channels == 1 else ""
        raise CheckpointError(
            f"{name} is for images of {channels} channel{'s' * (channels > 1)}, but vitscale's models take "
            f"red, green and blue{way_out}"
        )


def _count_blocks(first: str, shapes: Shapes) -> int:
    """The number of blocks, given a tensor name of block 0 that has no other 0 before that."""
    before, _, after = first.partition("0")
    num_blocks = 0
    while f"{before}{num_blocks}{after}" in shapes:
        num_blocks += 1
    return num_blocks


def _image_size(num_patches: int, patch_size: int, name: str, given: ImageSize) -> ImageSize:
    """Of images of so many patches: `given`, if it is no square and fits, else a square's.

    name: of the position embeddings. Raises CheckpointError if no square has so many patches.
    """
    if isinstance(given, tuple) and patches_of(given, patch_size) == num_patches:
        return given
    side = math.isqrt(max(0, num_patches))
    if side * side != num_patches:
        others = f" nor images of {_pixels(given)} pixels" if given else ""
        raise CheckpointError(
            f"{name} is for {num_patches} patches, which make no square{others}; add "
            f"model.image_size=[HEIGHT,WIDTH], of so many patches of {patch_size} x {patch_size} pixels"
        )
    return patch_size * side


def _check_image_size(dialect: Dialect, config_json: Mapping[str, Any], values: Values) -> None:
    """Raise CheckpointError if config.json states another image size than that of `values`."""
    stated = stated_size(dialect, config_json)
    if stated and parsed_size(stated[1]) != values["image_size"]:
        key, size = stated
        raise CheckpointError(
            f"config.json has {key} {size!r}, but the position embeddings would be those of "
            f"{_pixels(values['image_size'])}"
        )


def _pixels(size: ImageSize) -> str:
    return " x ".join(map(str, sides(size)))


def _num_heads(values: Values, config_json: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """The number of heads, if an override gives it, or a file names an architecture."""
    sizes = (values["width"], values["depth"], values["mlp_dim"])
    known = [v.num_heads for v in VARIANTS.values() if (v.width, v.depth, v.mlp_dim) == sizes]
    usual = known[0] if known else max(1, int(values["width"]) // 64)
    if not (known and config_json.get("architecture")):
        _ask("num_heads", f"the number of heads, often {usual} for a width of {values['width']}", overrides)
    return usual


def _ask(key: str, meaning: str, overrides: Sequence[str]) -> None:
    """Raise CheckpointError unless an override gives a key that no file says."""
    if not any(override.startswith(f"model.{key}=") for override in overrides):
        raise CheckpointError(f"no file beside the weights says model.{key}; add model.{key}=... ({meaning})")


def _with_variant(values: Values) -> Values:
    """The same values, with a variant in place of the sizes that it stands for, if one does."""
    if values.get("kind") == "hybrid":
        return _with_hybrid_variant(values)
    name = _variant_name(values)
    replaced = (*_VARIANT_KEYS, "patch_size") if name else ("patch_size",)
    return {"variant": f"{name or 'B'}/{values['patch_size']}", **_without(values, replaced)}


def _with_hybrid_variant(values: Values) -> Values:
    name = _variant_name(values)
    stem = Stem(tuple(values["stem_stages"]), values["patch_size"])
    stem_name = next((key for key, known in STEMS.items() if known == stem), "")
    if not name or not stem_name or values["stem_width"] != ROOT_WIDTH:
        return {"variant": "R+B/16", **values}
    root, _, number = stem_name.partition("/")
    replaced = (*_VARIANT_KEYS, "patch_size", "stem_width", "stem_stages")
    return {"variant": f"{root}+{name}/{number}", **_without(values, replaced)}


def _variant_name(values: Values) -> str:
    """What VARIANTS calls a ViT of these sizes; "" if it has none."""
    sizes = tuple(values[key] for key in _VARIANT_KEYS)
    return next((name for name, known in VARIANTS.items() if dataclasses.astuple(known) == sizes), "")


def _without(values: Values, keys: Sequence[str]) -> Values:
    return {key: value for key, value in values.items() if key not in keys}
