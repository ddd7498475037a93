"""Our parameters beside those of timm, transformers and Google's .npz files: names and layouts, both ways.

Every dialect is a table of Rules: a few of our tensors, and the few of theirs that hold the same numbers.
Rules move values and never change them, so a round trip is exact; on meta tensors they give shapes without
memory.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vitscale.models.vit import ModelConfig, ViT

Dialect = Literal["vitscale", "timm", "transformers", "original", "linen", "big_vision"]
FLAX_DIALECTS = ("original", "linen", "big_vision")
Shapes = Mapping[str, tuple[int, ...]]
Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of one tensor: to theirs, to ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Our tensors `ours` and their tensors `theirs` hold the same numbers; the functions turn one list into
    the other.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[[Sequence[Tensor]], list[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], list[Tensor]]


def rules(dialect: Dialect, config: ModelConfig) -> list[Rule]:
    """The whole model, in the order of our parameters. A fixed position embedding counts as a learned one,
    but in big_vision, which computes the same.
    """
    if dialect == "vitscale":
        return [_rule(name, (name,), _SAME) for name in our_shapes(config)]
    if dialect != "big_vision":
        config = dataclasses.replace(config, posemb="learned")
    table = {"timm": _timm, "transformers": _transformers}.get(dialect)
    return list(table(config) if table else _flax(dialect, config))


def to_theirs(table: Iterable[Rule], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors one by one, made from ours, which `read` gives by name when they are needed."""
    for rule in table:
        yield from zip(rule.theirs, rule.to_theirs([read(name) for name in rule.ours]), strict=True)


def to_ours(table: Iterable[Rule], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one, made from theirs, which `read` gives by name when they are needed."""
    for rule in table:
        yield from zip(rule.ours, rule.to_ours([read(name) for name in rule.theirs]), strict=True)


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our parameters, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in ViT(config).named_parameters()}


def their_shapes(dialect: Dialect, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dialect's tensors for a model of ours, in the order of our parameters."""
    shapes = our_shapes(config if dialect == "vitscale" else dataclasses.replace(config, posemb="learned"))
    tensors = to_theirs(rules(dialect, config), lambda name: torch.empty(shapes[name], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def single_names(dialect: Dialect) -> dict[str, str]:
    """Their name of each of ours that is one tensor there too, for a model of one block with all that a model
    can have.
    """
    largest = ModelConfig(variant="mu/1", image_size=1, num_classes=1, representation_size=1)
    found = {}
    for pool in ("map", "token"):
        for rule in rules(dialect, dataclasses.replace(largest, pool=pool)):
            if len(rule.ours) == len(rule.theirs):
                found |= dict(zip(rule.ours, rule.theirs, strict=True))
    return found


# timm: our names are timm's, but for these; and its patch embedding is a convolution.
_TIMM_NAMES = {"attn_pool.probe": "attn_pool.latent"}

# transformers, below vit.encoder.layer.N: the names on disk, which version 5 still reads and writes.
_TRANSFORMERS_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}

# Flax, below Transformer/encoderblock_N: the numbers are those of the dialect (_FLAX_NUMBERS).
_FLAX_BLOCK = {
    "norm1": ("LayerNorm_0",),
    "attn.qkv": tuple(f"MultiHeadDotProductAttention_{{attn}}/{part}" for part in ("query", "key", "value")),
    "attn.proj": ("MultiHeadDotProductAttention_{attn}/out",),
    "norm2": ("LayerNorm_{norm}",),
    "mlp.fc1": ("MlpBlock_{mlp}/Dense_0",),
    "mlp.fc2": ("MlpBlock_{mlp}/Dense_1",),
}
_FLAX_NUMBERS = {
    "original": {"attn": 1, "norm": 2, "mlp": 3},  # before Flax's linen, modules were counted together
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


def _timm(config: ModelConfig) -> Iterator[Rule]:
    for name in our_shapes(config):
        layout = _conv(config.resolved_patch_size) if name == "patch_embed.proj.weight" else _SAME
        yield _rule(name, (_TIMM_NAMES.get(name, name),), layout)


def _transformers(config: ModelConfig) -> Iterator[Rule]:
    yield _rule("cls_token", ("vit.embeddings.cls_token",), _SAME)
    yield _rule("pos_embed", ("vit.embeddings.position_embeddings",), _SAME)
    patch = "vit.embeddings.patch_embeddings.projection"
    yield _rule("patch_embed.proj.weight", (f"{patch}.weight",), _conv(config.resolved_patch_size))
    yield _rule("patch_embed.proj.bias", (f"{patch}.bias",), _SAME)
    modules: dict[str, tuple[str, ...]] = {}
    for i in range(config.resolved_depth):
        for ours, theirs in _TRANSFORMERS_BLOCK.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"vit.encoder.layer.{i}.{name}" for name in theirs)
    modules["norm"] = ("vit.layernorm",)
    if config.representation_size:
        modules["pre_logits"] = ("vit.pooler.dense",)
    if config.num_classes:
        modules["head"] = ("classifier",)
    for ours, theirs in modules.items():
        for leaf in ("weight", "bias"):
            yield _rule(f"{ours}.{leaf}", tuple(f"{name}.{leaf}" for name in theirs), _SAME)


def _flax(dialect: Dialect, config: ModelConfig) -> Iterator[Rule]:
    prefix = "params/" if dialect == "big_vision" else ""
    yield from _flax_tokens(dialect, config, prefix)
    kernel, bias = f"{prefix}embedding/kernel", f"{prefix}embedding/bias"
    yield _rule("patch_embed.proj.weight", (kernel,), _hwio(config.resolved_patch_size))
    yield _rule("patch_embed.proj.bias", (bias,), _SAME)
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
        for leaf, their_leaf, layout in _flax_leaves(ours, config.resolved_num_heads):
            yield _rule(f"{ours}.{leaf}", tuple(f"{name}/{their_leaf}" for name in theirs), layout)


def _flax_tokens(dialect: Dialect, config: ModelConfig, prefix: str) -> Iterator[Rule]:
    token, learned = config.pool == "token", config.posemb == "learned"
    if dialect == "big_vision" and token and learned:
        yield _FOLDED_CLASS_TOKEN
        return
    if token:
        yield _rule("cls_token", (f"{prefix}cls",), _SAME)
    if learned:
        posemb = "pos_embedding" if dialect == "big_vision" else "Transformer/posembed_input/pos_embedding"
        yield _rule("pos_embed", (prefix + posemb,), _SAME)


def _flax_leaves(module: str, num_heads: int) -> list[tuple[str, str, Layout]]:
    """(our leaf, their leaf, layout) of one of our modules."""
    last = module.rpartition(".")[2]
    if last.startswith("norm"):
        return [("weight", "scale", _SAME), ("bias", "bias", _SAME)]
    if last in ("qkv", "q", "kv"):
        return [("weight", "kernel", _heads_out(num_heads)), ("bias", "bias", _heads(num_heads))]
    if last == "proj":
        return [("weight", "kernel", _heads_in(num_heads)), ("bias", "bias", _SAME)]
    return [("weight", "kernel", _TRANSPOSED), ("bias", "bias", _SAME)]


def _rule(ours: str, theirs: tuple[str, ...], layout: Layout) -> Rule:
    """One tensor of ours, which is theirs one below another (q, k and v), each in `layout`."""
    to_theirs, to_ours = layout
    return Rule(
        ours=(ours,),
        theirs=theirs,
        to_theirs=lambda tensors: [to_theirs(part) for part in tensors[0].chunk(len(theirs))],
        to_ours=lambda tensors: (
            [torch.cat([to_ours(tensor) for tensor in tensors])]
            if len(tensors) > 1
            else [to_ours(tensors[0])]
        ),
    )


def _unfold_class_token(tensors: Sequence[Tensor]) -> list[Tensor]:
    cls, posemb = tensors
    return [cls, torch.cat([torch.zeros_like(cls), posemb], dim=1)]


# big_vision adds positions before it puts the class token in front: its token has its own position added.
_FOLDED_CLASS_TOKEN = Rule(
    ours=("cls_token", "pos_embed"),
    theirs=("params/cls", "params/pos_embedding"),
    to_theirs=lambda tensors: [tensors[0] + tensors[1][:, :1], tensors[1][:, 1:]],
    to_ours=_unfold_class_token,
)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.T


_SAME: Layout = (_itself, _itself)
_TRANSPOSED: Layout = (_transpose, _transpose)  # [out, in] and [in, out]


def _conv(patch: int) -> Layout:
    """[D, 3 P P] and OIHW [D, 3, P, P]."""
    return (lambda ours: ours.unflatten(1, (3, patch, patch)), lambda theirs: theirs.flatten(1))


def _hwio(patch: int) -> Layout:
    """[D, 3 P P] and HWIO [P, P, 3, D]."""
    return (
        lambda ours: ours.unflatten(1, (3, patch, patch)).permute(2, 3, 1, 0),
        lambda theirs: theirs.permute(3, 2, 0, 1).flatten(1),
    )


def _heads_out(num_heads: int) -> Layout:
    """[K d, D] and [D, K, d]: a layer into the heads."""
    return (lambda ours: ours.T.unflatten(1, (num_heads, -1)), lambda theirs: theirs.flatten(1).T)


def _heads_in(num_heads: int) -> Layout:
    """[D, K d] and [K, d, D]: a layer out of the heads."""
    return (lambda ours: ours.T.unflatten(0, (num_heads, -1)), lambda theirs: theirs.flatten(0, 1).T)


def _heads(num_heads: int) -> Layout:
    """[K d] and [K, d]."""
    return (lambda ours: ours.unflatten(0, (num_heads, -1)), lambda theirs: theirs.flatten())
