"""The distillation token: DeiT's parameters, its logits written out, and what it goes with."""

import dataclasses

import pytest
import torch
from weights.foreign_models import randomise

from vitscale.memory import head_bytes
from vitscale.models import build_model, empty_model
from vitscale.models.transfer import check_backbone, is_backbone, is_head
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels, layer_of

TINY = ViTConfig(
    variant="Ti/4",
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    image_size=8,
    num_classes=5,
    distilled=True,
)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_model(**changes: object) -> ViT:
    model = randomise(build_model(dataclasses.replace(TINY, **changes), 0))
    assert isinstance(model, ViT)
    return model


@pytest.mark.parametrize(
    ("variant", "params"), [("Ti/16", 5_910_800), ("S/16", 22_436_432), ("B/16", 87_338_192)]
)
def test_parameter_counts_are_deits_to_the_unit(variant: str, params: int) -> None:
    model = empty_model(ViTConfig(variant=variant, distilled=True))
    assert sum(param.numel() for param in model.parameters()) == params


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_logits_are_the_mean_of_both_heads_on_their_tokens(registers: int) -> None:
    model = random_model(num_registers=registers)
    x = model.patch_embed(IMAGES)
    tokens = [model.cls_token.expand(3, -1, -1), model.dist_token.expand(3, -1, -1)]
    x = torch.cat([*tokens, x], dim=1) + model.pos_embed  # [B, 2 + n, D]
    if registers:
        x = torch.cat([x[:, :2], model.reg_token.expand(3, -1, -1), x[:, 2:]], dim=1)
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    heads = torch.stack([model.head(x[:, 0]), model.head_dist(x[:, 1])], dim=1)
    for mode in (True, False):
        model.train(mode)
        assert torch.allclose(model(IMAGES, separate_heads=True), heads, atol=1e-6)
        assert torch.allclose(model(IMAGES), heads.mean(1), atol=1e-6)
    assert torch.allclose(model.features(IMAGES), x[:, 0], atol=1e-6)
    assert torch.allclose(model.features(IMAGES, tokens=True), x[:, 2 + registers :], atol=1e-6)
    assert (heads[:, 0] - heads[:, 1]).abs().min() > 1e-3


def test_fixed_positions_leave_both_tokens_without_one() -> None:
    model = build_model(dataclasses.replace(TINY, posemb="sincos2d"), 0)
    assert model.pos_embed.shape == (1, 6, 32)
    assert not model.pos_embed[:, :2].any() and model.pos_embed[:, 2:].any()
    assert model.dist_token.std() > 0.01 and not model.cls_token.any()  # else they would stay alike


def test_what_is_common_starts_as_without_the_token() -> None:
    with_token = dict(build_model(TINY, 3).named_parameters())
    without = dict(build_model(dataclasses.replace(TINY, distilled=False), 3).named_parameters())
    assert with_token.keys() - without.keys() == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert torch.equal(with_token["blocks.1.mlp.fc1.weight"], without["blocks.1.mlp.fc1.weight"])
    assert not with_token["head_dist.weight"].any()


def test_the_token_is_an_embedding_and_its_head_a_head() -> None:
    assert layer_of("dist_token") == 0 and layer_of("head_dist.weight") is None
    assert kernels(build_model(TINY, 0)) >= {"head.weight", "head_dist.weight"}
    assert is_backbone("dist_token")
    assert is_head("head_dist.bias") and not is_backbone("head_dist.bias")
    assert head_bytes(TINY, 4) == 2 * head_bytes(dataclasses.replace(TINY, distilled=False), 4)


def test_a_backbone_with_the_token_is_another_one() -> None:
    check_backbone(TINY, dataclasses.replace(TINY, image_size=16, num_classes=3))
    with pytest.raises(ValueError, match=r"distilled is false, .* has true; set model\.distilled = true$"):
        check_backbone(TINY, dataclasses.replace(TINY, distilled=False))


def test_without_classes_it_gives_features() -> None:
    model = random_model(num_classes=0)
    assert model.head_dist is None and model(IMAGES).shape == (3, 32)
