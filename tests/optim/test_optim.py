"""Weight decay acts on kernels only, as the paper means it; frozen parameters do not train."""

import dataclasses

import pytest
import torch
from torch import nn

from vitscale.errors import ConfigError
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import OptimConfig, build_optimizer, freeze, kernels, parameter_groups

CONFIG = ViTConfig(
    variant="Ti/4",
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=8,
    image_size=8,
    num_classes=3,
    representation_size=4,
    pool="map",
)


def test_decay_is_for_kernels_only() -> None:
    model = build_model(CONFIG, 0)
    assert kernels(model) == {
        *(f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *(f"attn_pool.{n}.weight" for n in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")),
        "patch_embed.proj.weight",
        "pre_logits.weight",
        "head.weight",
    }
    groups = parameter_groups(model, 0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_decay_is_decoupled_and_multiplied_by_the_rate() -> None:
    model = build_model(CONFIG, 0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = build_optimizer(OptimConfig(lr=0.01, weight_decay=0.3), model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        factor = 1 - 0.01 * 0.3 if name in kernels(model) else 1.0
        assert torch.allclose(param, before[name] * factor, rtol=1e-6)


def test_decay_with_sgd_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.weight_decay must be 0 with optim.name = .sgd."):
        OptimConfig(name="sgd", weight_decay=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "optim.lr 0.0 must be above 0"),
        ({"eps": 0.0}, "optim.eps 0.0 must be above 0"),
        ({"betas": (0.9, 1.0)}, r"optim.betas \[0.9, 1.0\] and optim.momentum 0.9 must lie in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"optim.betas \[-0.1, 0.9\]"),
        ({"momentum": 1.0}, "optim.momentum 1.0 must lie"),
        ({"weight_decay": -0.1}, "optim.weight_decay -0.1 and optim.clip_norm 1.0 must not be negative"),
        ({"clip_norm": -1.0}, "optim.weight_decay 0.0 and optim.clip_norm -1.0 must not be negative"),
        ({"layer_decay": 0.0}, r"optim.layer_decay 0.0 must lie in \(0, 1\]"),
        ({"layer_decay": 1.1}, "optim.layer_decay 1.1 must lie"),
        ({"ema_decay": 1.0}, r"optim.ema_decay 1.0 must lie in \[0, 1\)"),
        ({"ema_decay": -0.1}, "optim.ema_decay -0.1 must lie"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    lowest = {"betas": (0.0, 0.0), "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, "ema_decay": 0.0}
    OptimConfig(**lowest)
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)


def test_the_optimizer_is_the_one_that_is_named() -> None:
    model = build_model(CONFIG, 0)
    adamw = build_optimizer(OptimConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-6), model)
    assert type(adamw) is torch.optim.AdamW
    for group in adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-6)
    sgd = build_optimizer(OptimConfig(name="sgd", lr=0.03, momentum=0.7), model)
    assert type(sgd) is torch.optim.SGD
    for group in sgd.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.03, 0.7, 0.0)


def test_sgd_without_momentum_subtracts_gradients_bit_for_bit() -> None:
    model = nn.Linear(50, 40)
    weight = model.weight.detach().clone()
    sgd = build_optimizer(OptimConfig(name="sgd", lr=0.3, momentum=0.0), model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(40, 50, generator=generator) * torch.logspace(-20, 2, 50)
        model.weight.grad = gradient.clone()
        sgd.step()
        plain = torch.optim.SGD([weight], lr=0.3)
        weight.grad = gradient
        plain.step()
        assert torch.equal(model.weight, weight)


def test_layer_decay_gives_each_layer_its_share_of_the_rate() -> None:
    model = build_model(dataclasses.replace(CONFIG, depth=3), 0)
    freeze(model, ["blocks.[02].*"])  # what is frozen still counts as a layer
    named = {id(param): name for name, param in model.named_parameters()}
    groups = parameter_groups(model, 0.1, layer_decay=0.5)
    shares = {named[id(param)]: group["lr_share"] for group in groups for param in group["params"]}
    assert shares.pop("patch_embed.proj.weight") == shares.pop("pos_embed") == 0.5**4
    assert shares.pop("blocks.1.norm1.bias") == shares.pop("blocks.1.mlp.fc1.weight") == 0.5**2
    assert shares.pop("norm.weight") == shares.pop("head.bias") == shares.pop("attn_pool.probe") == 1.0
    assert {group["weight_decay"] for group in groups if group["name"] == "decay"} == {0.1}
    assert {group["weight_decay"] for group in groups if group["name"] == "no_decay"} == {0.0}
    assert {group["lr_share"] for group in parameter_groups(model, 0.1)} == {1.0}


def trained(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ((), set()),
        (("head.bias",), {"head.bias"}),
        (("patch_embed.*",), {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        (("blocks.[01].norm1.*", "pos_embed"), {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "pos_embed"}),
    ],
)
def test_freeze_takes_exactly_what_the_patterns_match_out_of_training(
    patterns: tuple[str, ...], frozen: set[str]
) -> None:
    model = build_model(CONFIG, 0)
    everything = trained(model)
    freeze(model, patterns)
    assert trained(model) == everything - frozen and len(frozen) < len(everything)
    named = {id(param): name for name, param in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert {named[id(param)] for group in groups for param in group["params"]} == everything - frozen


def test_a_group_that_is_frozen_as_a_whole_is_left_out() -> None:
    model = nn.Linear(2, 3)
    freeze(model, ["weight"])
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["no_decay"]


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist() -> None:
    model = build_model(CONFIG, 0)
    everything = trained(model)
    with pytest.raises(ConfigError) as error:
        freeze(model, ["blokcs.*"])
    names = ", ".join([name for name, _ in model.named_parameters()][:3])
    assert str(error.value) == f"optim.freeze 'blokcs.*' matches no parameter; they are named like {names}"
    assert trained(model) == everything


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.freeze \['head.\*', '\*'\] leaves nothing to train"):
        freeze(build_model(CONFIG, 0), ["head.*", "*"])
