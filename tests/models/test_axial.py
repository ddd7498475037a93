"""Axial attention (paper, appendix D.6): within one row, then within one column."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.errors import CheckpointError, ConfigError
from vitscale.inspection.attention import attention_maps, observe_attention
from vitscale.models import build_model
from vitscale.models.flops import forward_flops, forward_macs
from vitscale.models.layers import Attention, Checkpointing
from vitscale.models.transfer import check_backbone
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.configs import check_expressible
from vitscale.weights.foreign.deduce import check_tensors

ROWS, COLS = 3, 5
TINY = ViTConfig(
    variant="Ti/4",
    width=32,
    depth=4,
    num_heads=4,
    mlp_dim=48,
    image_size=(4 * ROWS, 4 * COLS),
    num_classes=5,
    pool="mean",
    attention="axial",
)
IMAGES = torch.randn(2, 3, *TINY.image_size, generator=torch.Generator().manual_seed(2)).double()


def make(config: ViTConfig = TINY) -> ViT:
    """A model all of whose parameters have an effect."""
    model = build_model(config, 0)
    assert isinstance(model, ViT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))
    return model.double()


def seen_from(layer: int) -> Tensor:
    """Which patches a patch attends to, [N, N]: those of its row, or in odd layers column."""
    row, col = torch.arange(ROWS * COLS) // COLS, torch.arange(ROWS * COLS) % COLS
    line = col if layer % 2 else row
    return line[:, None] == line[None, :]


def masked_attention(attention: Attention, layer: int, x: Tensor) -> Tensor:
    """The same attention by its definition, as one of all patches with a mask."""
    query, key, value = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, seen_from(layer))
    return attention.proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_blocks_attend_to_rows_and_columns_by_turns(checkpointing: Checkpointing) -> None:
    model = make()
    model.set_activation_checkpointing(checkpointing)
    x = model.patch_embed(IMAGES) + model.pos_embed
    for layer, block in enumerate(model.blocks):
        x = x + masked_attention(block.attn, layer, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    expected = model.norm(x)
    assert torch.allclose(model.features(IMAGES, tokens=True), expected)
    model.zero_grad()
    model.head(expected.mean(1)).square().sum().backward()
    wanted = [param.grad for param in model.parameters()]
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    for (name, param), grad in zip(model.named_parameters(), wanted, strict=True):
        assert grad is not None and grad.abs().max() > 0, name
        assert torch.allclose(param.grad, grad, rtol=1e-5, atol=1e-8), name  # heads are in fp32


def test_attention_is_observed_as_weights_of_all_patches() -> None:
    model, seen = make(), dict[int, Tensor]()
    observe_attention(model, IMAGES, seen.__setitem__)
    assert list(seen) == [0, 1, 2, 3]
    for layer, weights in seen.items():
        assert weights.shape == (2, 4, ROWS * COLS, ROWS * COLS)
        assert torch.equal(weights > 0, seen_from(layer).expand_as(weights))
        assert torch.allclose(weights.sum(-1), torch.ones(()))
    block = model.blocks[0]
    x = block.norm1(model.patch_embed(IMAGES) + model.pos_embed)
    value = block.attn.qkv(x).unflatten(2, (3, 4, 8))[:, :, 2].transpose(1, 2)  # [B, K, N, d]
    mixed = block.attn.proj((seen[0].double() @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, block.attn(x), atol=1e-6)
    assert attention_maps(model, IMAGES).shape == (2, ROWS, COLS)


def test_a_variant_has_two_blocks_for_each_of_its_own() -> None:
    """Paper, D.6: of rows and of columns, each with an MLP."""
    for variant, depth, ratio in (("B/32", 24, 1.96), ("B/16", 24, 1.92)):
        config = ViTConfig(variant=variant, pool="mean", attention="axial")
        assert config.resolved_depth == config.num_blocks == depth
        assert config.title == f"Axial-{variant}"
        plain = dataclasses.replace(config, attention="global")
        assert plain.title == variant
        assert forward_macs(config) / forward_macs(plain) == pytest.approx(ratio, abs=0.005)
    assert ViTConfig(variant="B/32", pool="mean", attention="axial", depth=12).resolved_depth == 12


def test_flops_are_those_of_the_operations() -> None:
    # Of attention on a CPU, the counter only knows this kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make()(IMAGES[:1], features_only=True)
    assert counter.get_total_flops() == forward_flops(TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "token"}, r'model.pool = "token": a class token is in no row .*; use "mean"$'),
        ({"distilled": True}, r"model.distilled = true: a distillation token is in no row .*; use false$"),
        ({"num_registers": 1}, r"model.num_registers = 1: a register is in no row .*; use 0"),
        ({"posemb": "relative"}, r'model.posemb = "relative": its offsets .*; use "learned"$'),
        ({"depth": 3}, r'model.depth 3 must be even with model.attention = "axial".*; use 4'),
    ],
)
def test_what_has_no_row_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("changes", [{"pool": "map"}, {"posemb": "learned2d", "posemb_at": "every_layer"}])
def test_what_is_of_patches_alone_is_not_refused(changes: dict[str, Any]) -> None:
    assert make(dataclasses.replace(TINY, **changes))(IMAGES).shape == (2, 5)


def test_another_attention_is_another_backbone() -> None:
    """The tensors are the same: it is the config that tells them apart."""
    plain = dataclasses.replace(TINY, attention="global")
    check_backbone(TINY, dataclasses.replace(TINY, image_size=40))
    with pytest.raises(ConfigError, match=r'model.attention is "global", .* has "axial"'):
        check_backbone(TINY, plain)
    shapes = {name: tuple(param.shape) for name, param in make().named_parameters()}
    check_tensors("vitscale", TINY, shapes)
    with pytest.raises(ConfigError, match=r"model.attention 'axial' must be 'global': models of timm"):
        check_tensors("timm", TINY, shapes)
    for dialect in ("timm", "transformers", "original", "big_vision"):
        with pytest.raises(CheckpointError, match=r"model.attention 'axial' cannot be exported"):
            check_expressible(dataclasses.replace(TINY, image_size=8), dialect)
