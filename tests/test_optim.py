"""Weight decay acts on kernels only, and as the paper means it."""

import pytest
import torch

from vitscale.config import ConfigError
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig
from vitscale.optim import OptimConfig, build_optimizer, is_kernel, parameter_groups

CONFIG = ModelConfig(
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
    decayed = {name for name, param in model.named_parameters() if is_kernel(name, param)}
    assert decayed == {
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
        factor = 1 - 0.01 * 0.3 if is_kernel(name, param) else 1.0
        assert torch.allclose(param, before[name] * factor, rtol=1e-6)


def test_decay_with_sgd_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.weight_decay must be 0 with optim.name = .sgd."):
        OptimConfig(name="sgd", weight_decay=0.1)
