"""The model is the paper's, to the parameter, the epsilon and the initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from models.ops import CountOps
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, sides
from vitscale.models import build_model
from vitscale.models.flops import forward_flops, forward_macs, train_flops
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig

TINY = ViTConfig(variant="Ti/4", width=32, depth=2, num_heads=4, mlp_dim=48, image_size=8, num_classes=5)


def count(config: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in ViT(config).parameters())


# Counted in Google's code: no head; 1,000 classes; 21,843 classes and the tanh layer.
@pytest.mark.parametrize(
    ("variant", "no_head", "imagenet", "in21k"),
    [
        ("B/16", 85_798_656, 86_567_656, 103_186_515),
        ("B/32", 87_455_232, 88_224_232, None),
        ("L/16", 303_301_632, 304_326_632, 326_740_307),
        ("L/32", 305_510_400, 306_535_400, None),
        ("H/14", 630_764_800, 632_045_800, 660_385_363),
    ],
)
def test_parameter_counts_are_the_papers_to_the_unit(
    variant: str, no_head: int, imagenet: int, in21k: int | None
) -> None:
    assert count(ViTConfig(variant=variant, num_classes=0)) == no_head
    assert count(ViTConfig(variant=variant)) == imagenet
    if in21k:
        width = ViTConfig(variant=variant).resolved_width
        assert count(ViTConfig(variant=variant, num_classes=21843, representation_size=width)) == in21k


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops"),
    [("B/32", 7, 56.1), ("B/16", 7, 224), ("L/32", 7, 196), ("L/16", 14, 1567), ("H/14", 14, 4262)],
)
def test_flops_give_the_exaflops_of_table_6(variant: str, epochs: int, exaflops: float) -> None:
    """Within 0.3% of the printed figures; for B/32, printed as 55, of the computed one."""
    total = train_flops(ViTConfig(variant=variant)) * 303e6 * epochs / 1e18
    assert total == pytest.approx(exaflops, rel=3e-3)


def test_macs_are_those_of_the_formula() -> None:
    for variant, gmacs in {
        "B/32": 4.408,
        "B/16": 17.563,
        "L/32": 15.377,
        "L/16": 61.554,
        "H/14": 167.294,
    }.items():
        assert forward_macs(ViTConfig(variant=variant)) / 1e9 == pytest.approx(gmacs, abs=1e-3)
    assert forward_flops(ViTConfig(variant="B/16")) == 2 * forward_macs(ViTConfig(variant="B/16"))


def reference_forward(model: ViT, images: Tensor) -> Tensor:
    """The same model written another way: convolution, one head at a time, plain formulas."""
    config, state = model.config, dict(model.named_parameters())
    width, heads, patch = config.resolved_width, config.resolved_num_heads, config.resolved_patch_size
    size = width // heads

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"].reshape(width, 3, patch, patch)
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=patch)
    x = x.permute(0, 2, 3, 1).reshape(len(images), -1, width)
    x = torch.cat([state["cls_token"].expand(len(images), 1, width), x], 1) + state["pos_embed"]
    for i in range(config.resolved_depth):
        y = norm(x, f"blocks.{i}.norm1")
        weight, bias = state[f"blocks.{i}.attn.qkv.weight"], state[f"blocks.{i}.attn.qkv.bias"]
        mixed = []
        for head in range(heads):
            rows = [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]
            q, k, v = (y @ weight[r].T + bias[r] for r in rows)
            attention = torch.softmax(torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(size), -1)
            mixed.append(torch.einsum("bqk,bkd->bqd", attention, v))
        x = x + dense(torch.cat(mixed, -1), f"blocks.{i}.attn.proj")
        h = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, f"blocks.{i}.mlp.fc2")
    x = torch.tanh(dense(norm(x, "norm")[:, 0], "pre_logits"))
    return dense(x, "head")


@pytest.mark.parametrize("size", [8, (4, 12)])
def test_the_forward_pass_equals_an_independent_one(size: ImageSize) -> None:
    changes = {"representation_size": 16, "image_size": size}
    model = build_model(ViTConfig(**{**vars(TINY), **changes}), seed=0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=torch.Generator().manual_seed(param.numel()))
    images = torch.randn(3, 3, *sides(size), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(images), reference_forward(model, images), atol=1e-5)
    assert torch.allclose(
        model.features(images) @ model.head.weight.T + model.head.bias, model(images), atol=1e-6
    )


def test_layer_norm_uses_googles_epsilon() -> None:
    x = (
        torch.full((1, 64), 3.0) + torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    )  # variance ~ 1e-6
    out = build_model(ViTConfig(**{**vars(TINY), "width": 64}), 0).norm(x).detach()
    assert out.std() == pytest.approx((x.var() / (x.var() + 1e-6)).sqrt().item(), rel=0.02)


def test_gelu_is_the_tanh_formula_unless_asked_otherwise() -> None:
    models = {kind: build_model(ViTConfig(**{**vars(TINY), "gelu": kind}), 0) for kind in ("tanh", "exact")}
    outs = {}
    for kind, model in models.items():
        mlp = model.blocks[0].mlp
        with torch.no_grad():
            for layer in (mlp.fc1, mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
            mlp.fc1.weight[0, 0] = mlp.fc2.weight[0, 0] = 1.0
        outs[kind] = mlp(torch.full((1, 1, 32), 2.7))[0, 0, 0].item()
    assert abs(outs["tanh"] - outs["exact"]) == pytest.approx(4.74e-4, abs=1e-5)


def test_weights_are_initialised_as_googles() -> None:
    model = build_model(
        ViTConfig(variant="S/16", image_size=32, head_bias=-6.9, representation_size=384), seed=3
    )
    width, limit = 384, math.sqrt(6 / (2 * 384))
    for part in model.blocks[0].attn.qkv.weight.split(width):
        assert part.abs().max().item() == pytest.approx(limit, rel=1e-3) and part.abs().max() <= limit
    assert model.blocks[1].mlp.fc1.weight.abs().max().item() == pytest.approx(
        math.sqrt(6 / (384 + 1536)), rel=1e-3
    )
    assert model.blocks[1].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.1)
    assert model.blocks[1].attn.qkv.bias.abs().max() == 0
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    patch = model.patch_embed.proj.weight
    assert patch.std().item() == pytest.approx(math.sqrt(1 / 768), rel=0.01)
    assert patch.abs().max().item() <= 2 * math.sqrt(1 / 768) / 0.87962566 + 1e-6
    assert model.cls_token.abs().max() == 0 and model.head.weight.abs().max() == 0
    assert torch.all(model.head.bias == -6.9)


def test_no_parameter_is_left_uninitialised_and_the_seed_decides_all() -> None:
    for pool in ("token", "mean", "map"):
        config = ViTConfig(**{**vars(TINY), "pool": pool, "representation_size": 8})
        model = ViT(config)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(math.nan)
        model.init_weights(5)
        assert all(torch.isfinite(param).all() for param in model.parameters())
        torch.manual_seed(99)
        again = build_model(config, 5)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("pool", ["token", "mean", "map"])
@pytest.mark.parametrize("posemb", ["learned", "sincos2d"])
def test_every_pooling_and_position_embedding_trains_all_parameters(pool: str, posemb: str) -> None:
    config = ViTConfig(**{**vars(TINY), "pool": pool, "posemb": posemb})
    model = build_model(config, 0)
    nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert model(images).shape == (2, 5) and model.features(images).shape == (2, 32)
    model(images).square().sum().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())
    assert not torch.allclose(model.features(images), model.features(images.roll(4, -1)), atol=1e-4)


def test_checkpointing_recomputes_all_of_a_block_or_what_is_cheap() -> None:
    """A block's last linear layer is not needed again: no gradient depends on its output."""
    model = build_model(TINY, 0)
    images, depth = torch.randn(2, 3, 8, 8), TINY.depth
    counts = {}
    for mode in ("none", "selective", "full"):
        model.set_activation_checkpointing(mode)
        with CountOps() as ops:
            model(images).sum().backward()
        counts[mode] = (ops.num["addmm"], ops.num["gelu"])
    (matmuls, gelus) = counts["none"]
    assert counts["selective"] == (matmuls, gelus + depth)
    assert counts["full"] == (matmuls + 3 * depth, gelus + depth)


@pytest.mark.usefixtures("without_type_checks")
def test_checkpointing_takes_no_other_word() -> None:
    with pytest.raises(ConfigError, match="mode 'everything' is not one of 'none', 'selective', 'full'"):
        build_model(TINY, 0).set_activation_checkpointing("everything")


def test_logits_of_a_16_bit_model_are_not_rounded_to_16_bits() -> None:
    """Rounded to bf16, logits near -10 would be multiples of 1/16."""
    model = build_model(ViTConfig(**{**vars(TINY), "head_bias": -10.0}), 0).bfloat16()
    nn.init.normal_(model.head.weight, std=0.1)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    features, logits = model.features(images), model(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    exact = features.double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    assert (logits * 16).frac().abs().max() > 0.1


def test_activation_checkpointing_changes_nothing() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    grads = []
    for mode in ("none", "selective", "full"):
        model = build_model(ViTConfig(**{**vars(TINY), "dropout": 0.2}), 0)
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
        model.set_activation_checkpointing(mode)
        torch.manual_seed(0)
        model(images).square().sum().backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))
    assert all(grad.abs().max() > 1e-6 for grad in grads[0] if grad is not None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "BB/16"}, r'model.variant "BB/16" is not NAME/PATCH .* for example "B/16"'),
        ({"variant": "B"}, "NAME/PATCH"),
        ({"image_size": 225}, "model.image_size 225 is not a multiple of the patch size 16; use 224"),
        ({"width": 100, "num_heads": 3}, "model.width 100 is not a multiple of model.num_heads 3"),
        ({"dropout": 1.0}, r"model.dropout 1.0 must lie in \[0, 1\)"),
    ],
)
def test_models_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**values)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="images of 12 x 12 pixels; this model takes 8 x 8"):
        build_model(TINY, 0)(torch.zeros(1, 3, 12, 12))
    wide = build_model(ViTConfig(**{**vars(TINY), "image_size": (4, 12)}), 0)
    with pytest.raises(ValueError, match="images of 12 x 4 pixels; this model takes 4 x 12"):
        wide(torch.zeros(1, 3, 12, 4))
    with pytest.raises(ValueError, match=r"takes \[B, 3, 4, 12\]: images\[None\] makes a batch"):
        wide(torch.zeros(3, 4, 12))
