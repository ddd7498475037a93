"""The position embeddings of the paper's appendix D.4, each against its definition."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from vitscale.errors import CheckpointError, ConfigError
from vitscale.memory import activation_bytes
from vitscale.models import build_model
from vitscale.models.flops import forward_macs
from vitscale.models.hybrid import HybridConfig
from vitscale.models.layers import Attention
from vitscale.models.posemb import RelativeBias, resize_axis, resize_posemb, table2d
from vitscale.models.transfer import check_backbone, transferred
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels, layer_of
from vitscale.weights.foreign.configs import check_expressible
from vitscale.weights.foreign.deduce import check_tensors

TINY = ViTConfig(variant="Ti/4", width=32, depth=2, num_heads=4, mlp_dim=48, image_size=12, num_classes=5)
ADDED = [(posemb, at) for posemb in ("learned", "learned2d") for at in ("input", "every_layer", "shared")]
KINDS = [*ADDED, ("none", "input"), ("relative", "input")]


def make(**values: object) -> ViT:
    """A model whose parameters, the zeros too, are drawn anew."""
    model = build_model(dataclasses.replace(TINY, **values), 0)
    assert isinstance(model, ViT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=generator)
    return model


def images_of(size: int = 12) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def test_an_embedding_of_two_axes_is_that_of_the_column_beside_that_of_the_row() -> None:
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    table = table2d(x, y)
    assert table.shape == (2, 20, 6)
    for layer, row, col in ((0, 0, 0), (0, 3, 1), (1, 2, 4)):
        assert torch.equal(table[layer, row * 5 + col], torch.cat([x[layer, col], y[layer, row]]))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_relative_bias_is_each_query_times_the_embedding_of_its_offset(before: int) -> None:
    count, heads, size = 6, 2, 4
    bias = RelativeBias(count, heads * size)
    nn.init.normal_(bias.embed)
    query = torch.randn(3, heads, before + count, size)
    found = bias(query)
    assert found.shape == (3, heads, before + count, before + count)
    expected = torch.zeros_like(found)
    for head in range(heads):
        for q in range(count):
            for k in range(count):
                key = bias.embed[q - k + count - 1, head * size : (head + 1) * size]
                logits = query[:, head, before + q] @ key / math.sqrt(size)
                expected[:, head, before + q, before + k] = logits
    torch.testing.assert_close(found, expected)


def test_relative_attention_adds_its_logits_before_the_softmax() -> None:
    bias = RelativeBias(6, 8)
    nn.init.normal_(bias.embed)
    attention = Attention(8, 2, bias)
    x = torch.randn(3, 7, 8)
    query, key, value = attention.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) / 2 + bias(query)).softmax(-1)
    expected = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize(("posemb", "at"), KINDS)
def test_parameters_are_counted(posemb: str, at: str) -> None:
    """9 patches and a class token, of width 32, in 2 layers of 4 heads."""
    count = {"learned": 10 * 32, "learned2d": 2 * 3 * 16, "none": 0, "relative": 2 * 17 * 32}[posemb]
    count *= 2 if at == "every_layer" else 1
    sizes = [
        sum(param.numel() for param in build_model(dataclasses.replace(TINY, **values), 0).parameters())
        for values in ({"posemb": posemb, "posemb_at": at}, {"posemb": "none"})
    ]
    assert sizes[0] - sizes[1] == count


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(("posemb", "at"), KINDS)
def test_positions_come_where_they_are_said_to(posemb: str, at: str, registers: int, pool: str) -> None:
    """Written again from the blocks: each position beside its token, where a layer has one."""
    model = make(posemb=posemb, posemb_at=at, num_registers=registers, pool=pool)
    images = images_of()
    prefix = int(pool == "token")
    x = model.patch_embed(images)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1)
    if model.reg_token is not None:
        x = torch.cat([x[:, :prefix], model.reg_token.expand(2, -1, -1), x[:, prefix:]], 1)
    for layer, block in enumerate(model.blocks):
        own = layer if at == "every_layer" else 0
        if posemb in ("learned", "learned2d") and (layer == 0 or at != "input"):
            x = x.clone()
            for place in range(9):
                if model.pos_embed is not None:
                    position = model.pos_embed[own, prefix + place]
                else:
                    column, row = model.pos_embed_x[own, place % 3], model.pos_embed_y[own, place // 3]
                    position = torch.cat([column, row])
                x[:, prefix + registers + place] += position
            if prefix and model.pos_embed is not None:
                x[:, 0] += model.pos_embed[own, 0]
        x = block(x)
    tokens = model.norm(x)[:, prefix + registers :]
    torch.testing.assert_close(model.features(images, tokens=True), tokens)


@pytest.mark.parametrize(("posemb", "at"), KINDS)
def test_all_parameters_are_initialised_trained_and_of_a_layer(posemb: str, at: str) -> None:
    # Of the last layer's queries, only the class token's would count, which has no position.
    config = dataclasses.replace(TINY, posemb=posemb, posemb_at=at, num_registers=1, pool="mean")
    model = ViT(config)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(math.nan)
    model.init_weights(5)
    again = build_model(config, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    positions = {n: p for n, p in model.named_parameters() if n.startswith("pos_embed") or "relative" in n}
    assert bool(positions) == (posemb != "none") and not positions.keys() & kernels(model)
    for name, param in positions.items():
        assert param.std().item() == pytest.approx(0.02, rel=0.3)
        assert layer_of(name) == (int(name.split(".")[1]) + 1 if posemb == "relative" else 0)
    nn.init.normal_(model.head.weight)
    model(images_of()).square().sum().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())


def test_only_without_positions_the_order_of_patches_does_not_matter() -> None:
    shuffled = images_of().unflatten(3, (3, 4)).flip(3).flatten(3)  # columns of patches, reversed
    for posemb, at in KINDS:
        model = make(posemb=posemb, posemb_at=at)
        equal = torch.allclose(model(images_of()), model(shuffled), atol=1e-4)
        assert equal == (posemb == "none"), (posemb, at)


@pytest.mark.parametrize(("posemb", "at"), [("relative", "input"), ("learned2d", "every_layer")])
def test_recomputation_changes_nothing(posemb: str, at: str) -> None:
    grads = []
    for mode in ("none", "selective", "full"):
        model = make(posemb=posemb, posemb_at=at, dropout=0.2)
        model.set_activation_checkpointing(mode)
        torch.manual_seed(0)
        model(images_of()).square().sum().backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.parametrize(("posemb", "at"), ADDED)
def test_learned_positions_move_to_another_resolution(posemb: str, at: str) -> None:
    source, target = make(posemb=posemb, posemb_at=at), make(posemb=posemb, posemb_at=at, image_size=20)
    check_backbone(source.config, target.config)
    state = {n: transferred(n, p, source.config, target.config) for n, p in source.named_parameters()}
    target.load_state_dict(state)
    old, new = source.position_embeddings(), target.position_embeddings()
    assert old is not None and new is not None and new.shape[1] == 26
    torch.testing.assert_close(new, resize_posemb(old, (3, 3), (5, 5)))
    for layer in range(len(old)):  # as if that layer's were the only ones
        torch.testing.assert_close(new[layer], resize_posemb(old[layer : layer + 1], (3, 3), (5, 5))[0])


def test_an_axis_may_get_as_many_places_as_an_embedding_has_numbers() -> None:
    assert resize_axis(torch.zeros(1, 3, 16), 16).shape == (1, 16, 16)


def test_relative_positions_stay_at_their_resolution() -> None:
    relative = dataclasses.replace(TINY, posemb="relative")
    check_backbone(relative, dataclasses.replace(relative, num_classes=7))
    larger = dataclasses.replace(relative, image_size=20)
    with pytest.raises(
        ConfigError, match=r"model.image_size 20 makes another grid .* set model.image_size = 12"
    ):
        check_backbone(relative, larger)
    upright = dataclasses.replace(relative, image_size=(20, 12))  # said as a config file has it
    with pytest.raises(ConfigError, match=r"model.image_size 12 .* set model.image_size = \[20, 12\]$"):
        check_backbone(upright, relative)
    none = dataclasses.replace(TINY, posemb="none")
    check_backbone(none, dataclasses.replace(none, image_size=20))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"posemb": "learned2d", "width": 33, "num_heads": 3}, '"learned2d" needs an even width, not 33'),
        ({"posemb": "none", "posemb_at": "shared"}, 'posemb_at "shared" is for "learned" and "learned2d"'),
        ({"posemb": "relative", "posemb_at": "every_layer"}, 'not for model.posemb "relative"; leave it out'),
        ({"posemb": "sincos2d", "posemb_at": "shared"}, 'not for model.posemb "sincos2d"'),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **values)


def test_another_kind_or_placement_is_another_backbone() -> None:
    learned2d = dataclasses.replace(TINY, posemb="learned2d")
    with pytest.raises(ConfigError, match=r'model.posemb is "learned2d", but .* "learned"'):
        check_backbone(TINY, learned2d)
    with pytest.raises(ConfigError, match=r'model.posemb_at is "shared", but .* "input"'):
        check_backbone(learned2d, dataclasses.replace(learned2d, posemb_at="shared"))


@pytest.mark.parametrize("dialect", ["timm", "transformers", "original", "linen", "big_vision"])
def test_other_libraries_have_no_place_for_them(dialect: str) -> None:
    check_expressible(TINY, dialect)
    for posemb, at in KINDS[1:]:
        config = dataclasses.replace(TINY, posemb=posemb, posemb_at=at)
        key = "posemb_at" if posemb == "learned" else "posemb"
        with pytest.raises(CheckpointError, match=rf"model.{key} '\w+' cannot be exported to {dialect}"):
            check_expressible(config, dialect)
        with pytest.raises(
            ConfigError, match=f"model.{key} .* must be .*: models of {dialect} have no other"
        ):
            check_tensors(dialect, config, {str(i): (1,) for i in range(9)})


def test_a_hybrid_has_them_too() -> None:
    config = HybridConfig(
        variant="R+Ti/16",
        stem_width=32,
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=32,
        image_size=64,
        num_classes=5,
    )
    for posemb, at in KINDS:
        model = build_model(dataclasses.replace(config, posemb=posemb, posemb_at=at), 0)
        assert model(images_of(64)).shape == (2, 5)


def test_relative_positions_cost_a_product_with_every_offset() -> None:
    relative = dataclasses.replace(TINY, posemb="relative")
    assert forward_macs(relative) - forward_macs(TINY) == 2 * 9 * 17 * 32
    sizes = [activation_bytes(config, 4, "fp32", "none") for config in (relative, TINY)]
    assert sizes[0] - sizes[1] == 4 * 2 * 4 * 4 * 10 * 10  # images, layers, bytes, heads, tokens
