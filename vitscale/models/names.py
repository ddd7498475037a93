"""Translates our parameters to those of timm, transformers and Google's .npz files, and back.

A dialect is a list of Rules, each for a few of our tensors and the few of theirs that hold the
same numbers. Rules move values without changing them, so a round trip is exact. On meta tensors
they give shapes without memory.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitscale.models import ModelConfig, empty_model
from vitscale.models.hybrid import HybridConfig
from vitscale.models.model import CommonConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import Pool, ViTConfig

# "bit" is BiT's, and the only other one of ResNets; the rest are of ViTs.
Dialect = Literal["vitscale", "timm", "transformers", "original", "linen", "big_vision", "bit"]
FLAX_DIALECTS: tuple[Dialect, ...] = ("original", "linen", "big_vision")
# Which of them each kind of model has.
DIALECTS_OF: dict[str, tuple[Dialect, ...]] = {
    "vit": ("vitscale", "timm", "transformers", *FLAX_DIALECTS),
    "hybrid": ("vitscale", "timm", "original", "linen"),
    "resnet": ("vitscale", "bit"),
}
BIT_ROOT = "resnet/root_block/standardized_conv2d/kernel"
# By dialect, the first convolution of a hybrid's stem: timm has another where no stage follows.
STEM_ROOTS: dict[Dialect, tuple[str, ...]] = {
    "timm": ("patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight"),
    "original": ("conv_root/kernel",),
    "linen": ("conv_root/kernel",),
}
Read = Callable[[str], Tensor]  # a whole tensor by name, as TensorSource.tensor gives it


class Relayout(NamedTuple):
    """How one tensor is laid out again for the dialect, and back."""

    to_theirs: Callable[[Tensor], Tensor]
    to_ours: Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Our tensors `ours` and their tensors `theirs` hold the same numbers; the functions turn
    one list into the other. An example with width D and K heads of width d:

        ours    blocks.0.attn.qkv.weight [3 D, D]
        theirs  .../query/kernel, .../key/kernel, .../value/kernel, each [D, K, d]
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[[Sequence[Tensor]], list[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], list[Tensor]]


def rules(dialect: Dialect, config: ModelConfig) -> list[Rule]:
    """The rules of the whole model, in the order of our parameters.

    Fixed position embeddings count as learned, except in big_vision, which computes them too.
    """
    if dialect == "vitscale":
        return [_rule(name, (name,), _SAME) for name in our_shapes(config)]
    if isinstance(config, ResNetConfig):
        assert dialect == "bit", "callers offer a ResNet no other"
        return list(_bit(config))
    if dialect != "big_vision":
        config = dataclasses.replace(config, posemb="learned")
    table = {"timm": _timm, "transformers": _transformers}.get(dialect)
    return list(table(config) if table else _flax(dialect, config))


def to_theirs(table: Iterable[Rule], read: Read) -> Iterator[tuple[str, Tensor]]:
    """The dialect's tensors one by one, from ours; `read` is called when a tensor is needed."""
    for rule in table:
        yield from zip(rule.theirs, rule.to_theirs([read(name) for name in rule.ours]), strict=True)


def to_ours(table: Iterable[Rule], read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one, from the dialect's; `read` is called when a tensor is needed."""
    for rule in table:
        yield from zip(rule.ours, rule.to_ours([read(name) for name in rule.theirs]), strict=True)


def our_shapes(config: CommonConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our parameters, in the model's order."""
    return {name: tuple(param.shape) for name, param in empty_model(config).named_parameters()}


def their_shapes(dialect: Dialect, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the dialect's tensors for a model, in the order of our parameters."""
    if isinstance(config, ViTConfig) and dialect != "vitscale":
        shapes = our_shapes(dataclasses.replace(config, posemb="learned"))
    else:
        shapes = our_shapes(config)
    tensors = to_theirs(rules(dialect, config), lambda name: torch.empty(shapes[name], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def one_to_one_names(dialect: Dialect, *, distilled: bool = False) -> dict[str, str]:
    """Maps each of a ViT's parameter names to the dialect's, where both keep it as one tensor.

    The names are those of a model with one block and every part that a model can have.
    distilled: those of one with a distillation token, whose heads have other names.
    """
    largest = ViTConfig(variant="mu/1", image_size=1, num_classes=1, num_registers=1)
    if distilled:
        configs = [dataclasses.replace(largest, distilled=True)]
    else:
        pools: tuple[Pool, ...] = ("map", "token")
        configs = [dataclasses.replace(largest, representation_size=1, pool=pool) for pool in pools]
    names = {}
    for config in configs:
        for rule in rules(dialect, config):
            if len(rule.ours) == len(rule.theirs):
                names |= dict(zip(rule.ours, rule.theirs, strict=True))
    return names


# timm has our names except for these, and its patch embedding is a convolution.
_TIMM_NAMES = {"attn_pool.probe": "attn_pool.latent"}

# transformers, below vit.encoder.layer.N: on disk, also those of its version 5.
_TRANSFORMERS_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}

# Flax, below Transformer/encoderblock_N: module numbers depend on the dialect (_FLAX_NUMBERS).
_FLAX_BLOCK = {
    "norm1": ("LayerNorm_0",),
    "attn.qkv": tuple(f"MultiHeadDotProductAttention_{{attn}}/{part}" for part in ("query", "key", "value")),
    "attn.proj": ("MultiHeadDotProductAttention_{attn}/out",),
    "norm2": ("LayerNorm_{norm}",),
    "mlp.fc1": ("MlpBlock_{mlp}/Dense_0",),
    "mlp.fc2": ("MlpBlock_{mlp}/Dense_1",),
}
_FLAX_NUMBERS = {
    "original": {"attn": 1, "norm": 2, "mlp": 3},  # Flax before linen: all kinds counted together
    "linen": {"attn": 0, "norm": 1, "mlp": 0},
    "big_vision": {"attn": 0, "norm": 1, "mlp": 0},
}

# big_vision, below MAPHead_0.
_FLAX_MAP_HEAD = {
    "q": ("MultiHeadDotProductAttention_0/query",),
    "kv": ("MultiHeadDotProductAttention_0/key", "MultiHeadDotProductAttention_0/value"),
    "proj": ("MultiHeadDotProductAttention_0/out",),
    "norm": ("LayerNorm_0",),
    "mlp.fc1": ("MlpBlock_0/Dense_0",),
    "mlp.fc2": ("MlpBlock_0/Dense_1",),
}

# BiT, below resnet/block{STAGE}/unit{BLOCK}: where a convolution is, and the norm before it.
_BIT_PLACES = {"conv1": "a", "norm1": "a", "conv2": "b", "norm2": "b", "conv3": "c", "norm3": "c"}

_BIT_NORM = {"weight": "gamma", "bias": "beta"}

# The layers of a hybrid's stem.
_TIMM_STEM = {"root": "conv", "downsample": "downsample.conv", "downsample_norm": "downsample.norm"}
_FLAX_STEM = {
    "root": "conv_root",
    "norm": "gn_root",
    "downsample": "conv_proj",
    "downsample_norm": "gn_proj",
    "norm1": "gn1",
    "norm2": "gn2",
    "norm3": "gn3",
}


def _timm(config: ViTConfig) -> Iterator[Rule]:
    stem = dict(_stem("timm", config)) if isinstance(config, HybridConfig) else {}
    for name in our_shapes(config):
        relayout = _conv(*_patch_shape(config)) if name == "patch_embed.proj.weight" else _SAME
        yield _rule(name, (stem.get(name) or _TIMM_NAMES.get(name, name),), relayout)


def _transformers(config: ViTConfig) -> Iterator[Rule]:
    yield _rule("cls_token", ("vit.embeddings.cls_token",), _SAME)
    if config.distilled:
        yield _rule("dist_token", ("vit.embeddings.distillation_token",), _SAME)
    if config.num_registers:
        yield _rule("reg_token", ("vit.embeddings.register_tokens",), _SAME)
    yield _rule("pos_embed", ("vit.embeddings.position_embeddings",), _SAME)
    patch = "vit.embeddings.patch_embeddings.projection"
    yield _rule("patch_embed.proj.weight", (f"{patch}.weight",), _conv(*_patch_shape(config)))
    yield _rule("patch_embed.proj.bias", (f"{patch}.bias",), _SAME)
    modules: dict[str, tuple[str, ...]] = {}
    for i in range(config.resolved_depth):
        for ours, theirs in _TRANSFORMERS_BLOCK.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"vit.encoder.layer.{i}.{name}" for name in theirs)
    modules["norm"] = ("vit.layernorm",)
    if config.representation_size:
        modules["pre_logits"] = ("vit.pooler.dense",)
    if config.num_classes and config.distilled:
        modules |= {"head": ("cls_classifier",), "head_dist": ("distillation_classifier",)}
    elif config.num_classes:
        modules["head"] = ("classifier",)
    for ours, theirs in modules.items():
        for leaf in ("weight", "bias"):
            yield _rule(f"{ours}.{leaf}", tuple(f"{name}.{leaf}" for name in theirs), _SAME)


def _flax(dialect: Dialect, config: ViTConfig) -> Iterator[Rule]:
    prefix = "params/" if dialect == "big_vision" else ""
    yield from _flax_tokens(dialect, config, prefix)
    kernel, bias = f"{prefix}embedding/kernel", f"{prefix}embedding/bias"
    yield _rule("patch_embed.proj.weight", (kernel,), _hwio(*_patch_shape(config)))
    yield _rule("patch_embed.proj.bias", (bias,), _SAME)
    if isinstance(config, HybridConfig):
        assert not prefix, "callers offer a hybrid no big_vision"
        for name, theirs in _stem(dialect, config):
            yield _rule(name, (theirs,), _CONV_HWIO if theirs.endswith("/kernel") else _SAME)
    modules: dict[str, tuple[str, ...]] = {}
    for i in range(config.resolved_depth):
        block, numbers = f"{prefix}Transformer/encoderblock_{i}", _FLAX_NUMBERS[dialect]
        for ours, theirs in _FLAX_BLOCK.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"{block}/{name.format(**numbers)}" for name in theirs)
    modules["norm"] = (f"{prefix}Transformer/encoder_norm",)
    if config.pool == "map":
        yield _rule("attn_pool.probe", (f"{prefix}MAPHead_0/probe",), _SAME)
        for ours, theirs in _FLAX_MAP_HEAD.items():
            modules[f"attn_pool.{ours}"] = tuple(f"{prefix}MAPHead_0/{name}" for name in theirs)
    if config.representation_size:
        modules["pre_logits"] = (f"{prefix}pre_logits",)
    if config.num_classes:
        modules["head"] = (f"{prefix}head",)
    for ours, theirs in modules.items():
        for leaf, their_leaf, relayout in _flax_leaves(ours, config.resolved_num_heads):
            yield _rule(f"{ours}.{leaf}", tuple(f"{name}/{their_leaf}" for name in theirs), relayout)


def _flax_tokens(dialect: Dialect, config: ViTConfig, prefix: str) -> Iterator[Rule]:
    token, learned = config.pool == "token", config.posemb == "learned"
    if dialect == "big_vision" and token and learned:
        yield _FOLDED_CLASS_TOKEN
        return
    if token:
        yield _rule("cls_token", (f"{prefix}cls",), _SAME)
    if learned:
        posemb = "pos_embedding" if dialect == "big_vision" else "Transformer/posembed_input/pos_embedding"
        yield _rule("pos_embed", (prefix + posemb,), _SAME)


def _patch_shape(config: ViTConfig) -> tuple[int, int]:
    """The channels that the patch embedding reads, and the places to a side of a patch."""
    if isinstance(config, HybridConfig):
        return config.stem_outputs, config.patch_places
    return 3, config.resolved_patch_size


def _stem(dialect: Dialect, config: HybridConfig) -> Iterator[tuple[str, str]]:
    """Our names of a stem's tensors, with the dialect's. An example in timm's and in Flax's:

    ours    patch_embed.stem.blocks.3.norm1.weight
    theirs  patch_embed.backbone.stages.1.blocks.0.norm1.weight    block2/unit1/gn1/scale
    """
    units = _units(config.resolved_stem_stages)
    for ours in our_shapes(config):
        if not ours.startswith("patch_embed.stem."):
            continue
        module, _, leaf = ours.removeprefix("patch_embed.stem.").rpartition(".")
        *block, layer = module.split(".")  # ["blocks", "3"] and "norm1", or [] and "root"
        stage, unit = units[int(block[1])] if block else (0, 0)
        if dialect == "timm":
            place = f"stages.{stage}.blocks.{unit}." if block else "stem." if units else ""
            yield ours, f"patch_embed.backbone.{place}{_TIMM_STEM.get(layer, layer)}.{leaf}"
        else:
            place = f"block{stage + 1}/unit{unit + 1}/" if block else ""
            their_leaf = "bias" if leaf == "bias" else "scale" if "norm" in layer else "kernel"
            yield ours, f"{place}{_FLAX_STEM.get(layer, layer)}/{their_leaf}"


def _units(stages: Sequence[int]) -> list[tuple[int, int]]:
    """The stage of every block, and its place there, both counted from 0."""
    return [(stage, block) for stage, blocks in enumerate(stages) for block in range(blocks)]


def _bit(config: ResNetConfig) -> Iterator[Rule]:
    yield _rule("root.weight", (BIT_ROOT,), _CONV_HWIO)
    units = [
        f"resnet/block{stage + 1}/unit{block + 1:02d}" for stage, block in _units(config.resolved_stages)
    ]
    for name in our_shapes(config):
        ours, _, leaf = name.rpartition(".")
        if not ours.startswith("blocks."):
            continue
        _, index, module = ours.split(".")
        place = f"{units[int(index)]}/{_BIT_PLACES.get(module, 'a/proj')}"
        if module.startswith("norm"):
            yield _rule(name, (f"{place}/group_norm/{_BIT_NORM[leaf]}",), _SAME)
        else:
            yield _rule(name, (f"{place}/standardized_conv2d/kernel",), _CONV_HWIO)
    for leaf, theirs in _BIT_NORM.items():
        yield _rule(f"norm.{leaf}", (f"resnet/group_norm/{theirs}",), _SAME)
    if config.num_classes:
        yield _rule("head.weight", ("resnet/head/conv2d/kernel",), _CONV_1X1)
        yield _rule("head.bias", ("resnet/head/conv2d/bias",), _SAME)


def _flax_leaves(module: str, num_heads: int) -> list[tuple[str, str, Relayout]]:
    """(our leaf, their leaf, relayout) of one of our modules."""
    last = module.rpartition(".")[2]
    if last.startswith("norm"):
        return [("weight", "scale", _SAME), ("bias", "bias", _SAME)]
    if last in ("qkv", "q", "kv"):
        return [("weight", "kernel", _heads_out(num_heads)), ("bias", "bias", _heads(num_heads))]
    if last == "proj":
        return [("weight", "kernel", _heads_in(num_heads)), ("bias", "bias", _SAME)]
    return [("weight", "kernel", _TRANSPOSED), ("bias", "bias", _SAME)]


def _rule(ours: str, theirs: tuple[str, ...], relayout: Relayout) -> Rule:
    """One tensor of ours for one of theirs, or for several along its first axis (q, k, v)."""

    def split(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [relayout.to_theirs(part) for part in tensors[0].chunk(len(theirs))]

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = [relayout.to_ours(tensor) for tensor in tensors]
        return [torch.cat(parts)] if len(parts) > 1 else parts

    return Rule(ours=(ours,), theirs=theirs, to_theirs=split, to_ours=join)


def _fold_class_token(tensors: Sequence[Tensor]) -> list[Tensor]:
    cls, posemb = tensors  # [1, 1, D] and [1, 1 + N, D]
    return [cls + posemb[:, :1], posemb[:, 1:]]


def _unfold_class_token(tensors: Sequence[Tensor]) -> list[Tensor]:
    cls, posemb = tensors  # [1, 1, D] and [1, N, D]
    return [cls, torch.cat([torch.zeros_like(cls), posemb], dim=1)]


# big_vision adds positions before it prepends the class token, which contains its own position.
_FOLDED_CLASS_TOKEN = Rule(
    ours=("cls_token", "pos_embed"),
    theirs=("params/cls", "params/pos_embedding"),
    to_theirs=_fold_class_token,
    to_ours=_unfold_class_token,
)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.T


_SAME = Relayout(_itself, _itself)
_TRANSPOSED = Relayout(_transpose, _transpose)  # [out, in] and [in, out]
# Of convolutions ours are OIHW, theirs HWIO; a linear layer [out, in] is a 1 x 1 convolution.
_CONV_HWIO = Relayout(lambda ours: ours.permute(2, 3, 1, 0), lambda theirs: theirs.permute(3, 2, 0, 1))
_CONV_1X1 = Relayout(lambda ours: ours.T[None, None], lambda theirs: theirs[0, 0].T)


def _conv(channels: int, patch: int) -> Relayout:
    """Ours [D, C P P], theirs OIHW [D, C, P, P]."""
    return Relayout(
        lambda ours: ours.unflatten(1, (channels, patch, patch)), lambda theirs: theirs.flatten(1)
    )


def _hwio(channels: int, patch: int) -> Relayout:
    """Ours [D, C P P], theirs HWIO [P, P, C, D]."""
    return Relayout(
        lambda ours: ours.unflatten(1, (channels, patch, patch)).permute(2, 3, 1, 0),
        lambda theirs: theirs.permute(3, 2, 0, 1).flatten(1),
    )


def _heads_out(num_heads: int) -> Relayout:
    """Ours [K d, D], theirs [D, K, d]: a layer whose output is cut into heads."""
    return Relayout(lambda ours: ours.T.unflatten(1, (num_heads, -1)), lambda theirs: theirs.flatten(1).T)


def _heads_in(num_heads: int) -> Relayout:
    """Ours [D, K d], theirs [K, d, D]: a layer whose input is cut into heads."""
    return Relayout(lambda ours: ours.T.unflatten(0, (num_heads, -1)), lambda theirs: theirs.flatten(0, 1).T)


def _heads(num_heads: int) -> Relayout:
    """Ours [K d], theirs [K, d]."""
    return Relayout(lambda ours: ours.unflatten(0, (num_heads, -1)), lambda theirs: theirs.flatten())
