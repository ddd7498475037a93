"""With pool = "token" the last block computes what is read of its outputs, and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.models.drop_path import draw_kept
from vitscale.models.flops import forward_flops
from vitscale.models.layers import Checkpointing
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig

DEPTH = 3
DISTILLED = {"distilled": True}
CASES = [
    {},
    {"num_registers": 3},
    {"posemb": "relative"},
    {"posemb_at": "every_layer"},
    DISTILLED,
]


def model_of(**changes: Any) -> ViT:
    """A model with a class token, all of whose parameters have an effect."""
    model = ViT(
        ViTConfig(
            variant="Ti/4",
            width=32,
            depth=DEPTH,
            num_heads=4,
            mlp_dim=48,
            image_size=16,
            num_classes=5,
            **changes,
        )
    )
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
    return model.double()


def results(model: ViT, images: Tensor, layers: list[int] | None) -> list[Tensor]:
    """The logits, and the gradients of all parameters."""
    kept = draw_kept(0.5, DEPTH, seed=0, step=1, first_position=0, count=len(images))
    out = model(images, layers=layers, kept=kept)
    logits = out if layers is None else out[0]
    model.zero_grad()
    (logits.square().sum() + logits.sum()).backward()
    return [logits, *(param.grad for param in model.parameters())]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", CASES)
def test_logits_and_gradients_are_those_of_a_model_that_computes_all(
    changes: dict[str, Any], checkpointing: Checkpointing
) -> None:
    model = model_of(**changes)
    model.set_activation_checkpointing(checkpointing)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = results(model, images, [DEPTH - 1])  # the tokens of the last block are asked for
    for part, expected in zip(results(model, images, None), whole, strict=True):
        assert torch.allclose(part, expected, rtol=1e-9, atol=1e-12)


def flops(model: ViT, **asked: Any) -> int:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    # Of attention on a CPU, the counter only knows this kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, features_only=True, **asked)
    return counter.get_total_flops()


@pytest.mark.parametrize(("changes", "num_read"), [({}, 1), (DISTILLED, 2), ({"num_registers": 3}, 1)])
def test_flops_are_saved_where_no_patch_is_read(changes: dict[str, Any], num_read: int) -> None:
    model = model_of(**changes)
    config = model.config
    tokens, width, mlp = config.num_tokens, config.resolved_width, config.resolved_mlp_dim
    # Attention of the query to all keys and values, the output projection, the MLP.
    saved = 2 * (tokens - num_read) * (2 * tokens * width + width**2 + 2 * width * mlp)
    assert flops(model) == forward_flops(config) - saved
    assert flops(model, tokens=True) == flops(model, layers=[0, DEPTH - 1]) == forward_flops(config)
    assert flops(model, layers=[0]) == flops(model)


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_other_pools_read_all_tokens(pool: str) -> None:
    model = model_of(pool=pool)
    assert flops(model) == flops(model, layers=[DEPTH - 1])
