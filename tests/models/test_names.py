"""Names and layouts of other libraries, against tables written by hand from their code."""

import dataclasses

import pytest
import torch
from torch import Tensor

from vitscale.models import ModelConfig, build_model
from vitscale.models.names import (
    FLAX_DIALECTS,
    Dialect,
    one_to_one_names,
    our_shapes,
    rules,
    their_shapes,
    to_ours,
    to_theirs,
)
from vitscale.models.vit_config import ViTConfig

# Width 12, 3 heads of width 4, MLP width 20, 2 x 2 pixels a patch on a 3 x 3 grid, one block.
CONFIG = ViTConfig(width=12, depth=1, num_heads=3, mlp_dim=20, patch_size=2, image_size=6, num_classes=5)
DIALECTS: list[Dialect] = ["vitscale", "timm", "transformers", *FLAX_DIALECTS]

BLOCK = "Transformer/encoderblock_0"
ORIGINAL = {
    "cls": (1, 1, 12),
    "Transformer/posembed_input/pos_embedding": (1, 10, 12),
    "embedding/kernel": (2, 2, 3, 12),
    "embedding/bias": (12,),
    f"{BLOCK}/LayerNorm_0/scale": (12,),
    f"{BLOCK}/LayerNorm_0/bias": (12,),
    f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel": (12, 3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/query/bias": (3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/key/kernel": (12, 3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/key/bias": (3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/value/kernel": (12, 3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/value/bias": (3, 4),
    f"{BLOCK}/MultiHeadDotProductAttention_1/out/kernel": (3, 4, 12),
    f"{BLOCK}/MultiHeadDotProductAttention_1/out/bias": (12,),
    f"{BLOCK}/LayerNorm_2/scale": (12,),
    f"{BLOCK}/LayerNorm_2/bias": (12,),
    f"{BLOCK}/MlpBlock_3/Dense_0/kernel": (12, 20),
    f"{BLOCK}/MlpBlock_3/Dense_0/bias": (20,),
    f"{BLOCK}/MlpBlock_3/Dense_1/kernel": (20, 12),
    f"{BLOCK}/MlpBlock_3/Dense_1/bias": (12,),
    "Transformer/encoder_norm/scale": (12,),
    "Transformer/encoder_norm/bias": (12,),
    "head/kernel": (12, 5),
    "head/bias": (5,),
}
LINEN_NUMBERS = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
MAP_HEAD = {
    "params/MAPHead_0/probe": (1, 1, 12),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/query/kernel": (12, 3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/query/bias": (3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/key/kernel": (12, 3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/key/bias": (3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/value/kernel": (12, 3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/value/bias": (3, 4),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": (3, 4, 12),
    "params/MAPHead_0/MultiHeadDotProductAttention_0/out/bias": (12,),
    "params/MAPHead_0/LayerNorm_0/scale": (12,),
    "params/MAPHead_0/LayerNorm_0/bias": (12,),
    "params/MAPHead_0/MlpBlock_0/Dense_0/kernel": (12, 20),
    "params/MAPHead_0/MlpBlock_0/Dense_0/bias": (20,),
    "params/MAPHead_0/MlpBlock_0/Dense_1/kernel": (20, 12),
    "params/MAPHead_0/MlpBlock_0/Dense_1/bias": (12,),
}
TRANSFORMERS = {
    "vit.embeddings.cls_token": (1, 1, 12),
    "vit.embeddings.position_embeddings": (1, 10, 12),
    "vit.embeddings.patch_embeddings.projection.weight": (12, 3, 2, 2),
    "vit.embeddings.patch_embeddings.projection.bias": (12,),
    "vit.encoder.layer.0.layernorm_before.weight": (12,),
    "vit.encoder.layer.0.layernorm_before.bias": (12,),
    "vit.encoder.layer.0.attention.attention.query.weight": (12, 12),
    "vit.encoder.layer.0.attention.attention.query.bias": (12,),
    "vit.encoder.layer.0.attention.attention.key.weight": (12, 12),
    "vit.encoder.layer.0.attention.attention.key.bias": (12,),
    "vit.encoder.layer.0.attention.attention.value.weight": (12, 12),
    "vit.encoder.layer.0.attention.attention.value.bias": (12,),
    "vit.encoder.layer.0.attention.output.dense.weight": (12, 12),
    "vit.encoder.layer.0.attention.output.dense.bias": (12,),
    "vit.encoder.layer.0.layernorm_after.weight": (12,),
    "vit.encoder.layer.0.layernorm_after.bias": (12,),
    "vit.encoder.layer.0.intermediate.dense.weight": (20, 12),
    "vit.encoder.layer.0.intermediate.dense.bias": (20,),
    "vit.encoder.layer.0.output.dense.weight": (12, 20),
    "vit.encoder.layer.0.output.dense.bias": (12,),
    "vit.layernorm.weight": (12,),
    "vit.layernorm.bias": (12,),
    "classifier.weight": (5, 12),
    "classifier.bias": (5,),
}


def linen(table: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    renamed = {}
    for name, shape in table.items():
        for old, new in LINEN_NUMBERS.items():
            name = name.replace(old, new)
        renamed[name] = shape
    return renamed


def big_vision(table: dict[str, tuple[int, ...]], *, token: bool) -> dict[str, tuple[int, ...]]:
    table = {f"params/{name}": shape for name, shape in linen(table).items()}
    del table["params/Transformer/posembed_input/pos_embedding"]
    if not token:
        del table["params/cls"]
    return table | {"params/pos_embedding": (1, 9, 12)}


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in our_shapes(config).items()}


def test_names_and_shapes_are_those_of_their_code() -> None:
    mean, head = dataclasses.replace(CONFIG, pool="mean"), dataclasses.replace(CONFIG, pool="map")
    assert their_shapes("original", CONFIG) == ORIGINAL
    assert their_shapes("linen", CONFIG) == linen(ORIGINAL)
    assert their_shapes("big_vision", CONFIG) == big_vision(ORIGINAL, token=True)
    assert their_shapes("big_vision", mean) == big_vision(ORIGINAL, token=False)
    assert their_shapes("big_vision", head) == big_vision(ORIGINAL, token=False) | MAP_HEAD
    assert their_shapes("transformers", CONFIG) == TRANSFORMERS


def test_a_tanh_layer_and_a_missing_head_are_named() -> None:
    upstream = dataclasses.replace(CONFIG, representation_size=7, num_classes=0)
    original, hf = their_shapes("original", upstream), their_shapes("transformers", upstream)
    assert (original["pre_logits/kernel"], original["pre_logits/bias"]) == ((12, 7), (7,))
    assert hf["vit.pooler.dense.weight"] == (7, 12)
    assert not [name for name in (*original, *hf) if name.startswith(("head/", "classifier"))]


def test_what_big_vision_computes_itself_is_left_out() -> None:
    fixed = dataclasses.replace(CONFIG, posemb="sincos2d")
    assert their_shapes("big_vision", fixed).keys() == their_shapes("big_vision", CONFIG).keys() - {
        "params/pos_embedding"
    }
    assert their_shapes("timm", fixed) == their_shapes("timm", CONFIG)


@pytest.mark.parametrize(
    ("dialect", "pool"),
    [("transformers", "token")]  # it has no other
    + [
        (dialect, pool)
        for dialect in DIALECTS
        if dialect != "transformers"
        for pool in ("token", "mean", "map")
    ],
)
def test_a_round_trip_changes_no_bit(dialect: Dialect, pool: str) -> None:
    config = dataclasses.replace(CONFIG, pool=pool, representation_size=7)
    state, table = random_state(config), rules(dialect, config)
    theirs = dict(to_theirs(table, state.__getitem__))
    back = dict(to_ours(table, theirs.__getitem__))
    assert back.keys() == state.keys() == build_model(config, 0).state_dict().keys()
    folded = ("cls_token", "pos_embed") if dialect == "big_vision" and pool == "token" else ()
    assert all(torch.equal(back[name], state[name]) for name in state if name not in folded)
    again = dict(to_theirs(table, back.__getitem__))
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_big_visions_class_token_has_its_position_added() -> None:
    state, table = random_state(CONFIG), rules("big_vision", CONFIG)
    theirs = dict(to_theirs(table, state.__getitem__))
    back = dict(to_ours(table, theirs.__getitem__))
    model, other = build_model(CONFIG, 0), build_model(CONFIG, 0)
    model.load_state_dict(state)
    other.load_state_dict(back)
    images = torch.randn(2, 3, 6, 6)
    assert not torch.equal(state["cls_token"], back["cls_token"])
    assert torch.equal(model(images), other(images))


# Of each dialect: the names of pos_embed, of blocks.0.mlp.fc1.bias and of attn_pool.probe.
ONE_TO_ONE = {
    "vitscale": ("pos_embed", "blocks.0.mlp.fc1.bias", "attn_pool.probe"),
    "timm": ("pos_embed", "blocks.0.mlp.fc1.bias", "attn_pool.latent"),
    "transformers": (
        "vit.embeddings.position_embeddings",
        "vit.encoder.layer.0.intermediate.dense.bias",
        None,
    ),
    "original": (
        "Transformer/posembed_input/pos_embedding",
        f"{BLOCK}/MlpBlock_3/Dense_0/bias",
        "MAPHead_0/probe",
    ),
    "linen": (
        "Transformer/posembed_input/pos_embedding",
        f"{BLOCK}/MlpBlock_0/Dense_0/bias",
        "MAPHead_0/probe",
    ),
    "big_vision": (
        "params/pos_embedding",
        f"params/{BLOCK}/MlpBlock_0/Dense_0/bias",
        "params/MAPHead_0/probe",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_one_tensor_on_both_sides_is_found_by_our_name(dialect: Dialect) -> None:
    names = one_to_one_names(dialect)
    ours = ("pos_embed", "blocks.0.mlp.fc1.bias", "attn_pool.probe")
    assert tuple(map(names.get, ours)) == ONE_TO_ONE[dialect]
    assert ("blocks.0.attn.qkv.weight" in names) == (dialect in ("vitscale", "timm"))
