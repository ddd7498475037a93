"""Stochastic depth: the same draws on any number of ranks, and what they do to a model."""

import dataclasses

import pytest
import torch

from vitscale.errors import ConfigError
from vitscale.models import build_model
from vitscale.models.drop_path import draw_kept
from vitscale.models.vit_config import ViTConfig

CONFIG = ViTConfig(
    variant="Ti/4", width=32, depth=3, num_heads=4, mlp_dim=48, image_size=8, num_classes=0, drop_path=0.5
)


def test_draws_are_those_of_the_global_batch_however_it_is_cut() -> None:
    whole = draw_kept(0.3, 5, seed=1, step=9, first_position=0, count=24)
    parts = [draw_kept(0.3, 5, seed=1, step=9, first_position=start, count=3) for start in range(0, 24, 3)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert not torch.equal(draw_kept(0.3, 5, seed=1, step=10, first_position=0, count=24), whole)
    assert not torch.equal(draw_kept(0.3, 5, seed=2, step=9, first_position=0, count=24), whole)


def test_the_rate_rises_evenly_and_the_mean_stays_one() -> None:
    kept = draw_kept(0.6, 4, seed=0, step=1, first_position=0, count=20_000)
    assert kept.shape == (4, 2, 20_000, 1, 1)
    assert (kept == 0).float().mean((2, 3, 4)).numpy() == pytest.approx(
        torch.linspace(0, 0.6, 4)[:, None].expand(4, 2).numpy(), abs=0.012
    )
    assert kept.mean((2, 3, 4)).numpy() == pytest.approx(1.0, abs=0.03)
    both, one = (kept[3] == 0).all(0).float().mean(), (kept[3, 0] == 0).float().mean()
    assert both.item() == pytest.approx(one.item() ** 2, abs=0.012)  # two branches, two draws


def test_an_image_without_its_branches_passes_through_and_others_do_not_notice() -> None:
    model = build_model(CONFIG, 0).train()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(3, 2, 3, 1, 1)
    plain = model(images)
    assert torch.equal(model(images, kept=kept), plain)
    kept[:, :, 1] = 0.0
    dropped = model(images, kept=kept)
    tokens = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    assert torch.equal(dropped[1], model.norm(tokens)[1, 0])
    torch.testing.assert_close(dropped[[0, 2]], plain[[0, 2]])
    kept[:, :, 1] = 1.0
    kept[1, 0] = kept[2, 1] = 2.0
    x = tokens
    for number, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x)) * (2 if number == 1 else 1)
        x = x + block.mlp(block.norm2(x)) * (2 if number == 2 else 1)
    torch.testing.assert_close(model(images, kept=kept), model.norm(x)[:, 0])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    dataclasses.replace(CONFIG, drop_path=0.0)
    with pytest.raises(ConfigError, match=rf"model.drop_path {rate} must lie in \[0, 1\)"):
        dataclasses.replace(CONFIG, drop_path=rate)
