"""Which patches are corrupted and how: shares, layouts, and what the model makes of it."""

import pytest
import torch
from torch import Tensor, nn

from vitscale.models import build_model
from vitscale.models.corruption import Corruption, draw_corruption
from vitscale.models.transfer import is_backbone
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels, layer_of

TINY = ViTConfig(
    variant="Ti/4",
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    image_size=12,
    num_classes=0,
    num_patch_outputs=7,
)
NUM_PATCHES = 9


def draw(count: int, *, first_position: int = 0, step: int = 1, seed: int = 0, n: int = 16) -> Corruption:
    return draw_corruption(
        n, n // 2, masked=0.8, replaced=0.1, seed=seed, step=step, first_position=first_position, count=count
    )


def random_model() -> ViT:
    """With a head that is not 0, so that gradients reach what is below it."""
    model = build_model(TINY, 0)
    assert isinstance(model, ViT)
    with torch.no_grad():
        model.patch_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_half_of_each_image_is_corrupted_and_of_these_8_in_10_are_masked() -> None:
    count, n = 5000, 16
    corrupted, sources = draw(count, n=n)
    assert corrupted.shape == (count, 8) and sources.shape == (count, n)
    assert (corrupted.diff(dim=1) > 0).all() and corrupted.min() == 0 and corrupted.max() == n - 1
    own = torch.arange(n).expand(count, n)
    left_alone = torch.ones(count, n, dtype=torch.bool).scatter_(1, corrupted, False)
    assert torch.equal(sources[left_alone], own[left_alone])

    def near(share: float, p: float, draws: int) -> bool:
        return abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5

    each = torch.bincount(corrupted.flatten(), minlength=n) / count
    assert all(near(share, 0.5, count) for share in each.tolist())
    given = sources.gather(1, corrupted)
    replaced = (given != n) & (given != corrupted)
    for kind, share in ((given == n, 0.8), (replaced, 0.1), (given == corrupted, 0.1)):
        assert near(kind.float().mean().item(), share, kind.numel())
    # Each of the 15 other patches is as likely.
    distance = ((given - corrupted) % n)[replaced]
    shares = torch.bincount(distance, minlength=n) / len(distance)
    assert shares[0] == 0 and all(near(share, 1 / 15, len(distance)) for share in shares[1:].tolist())


def test_an_image_is_corrupted_by_its_place_in_the_batch_alone() -> None:
    whole = draw(12)
    parts = [draw(count, first_position=first) for first, count in ((0, 4), (4, 1), (5, 7))]
    for name in Corruption._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert len({tuple(row) for row in whole.sources.tolist()}) == 12
    for other in (draw(12, step=2), draw(12, seed=1)):
        assert not torch.equal(other.sources, whole.sources)


def test_the_embeddings_are_replaced_before_the_positions_are_added() -> None:
    model, x = random_model(), images(2)
    # Patch 1 of the first image is masked, patch 3 gets the embedding of patch 8; the second
    # image predicts patches as they are.
    sources = torch.arange(NUM_PATCHES).repeat(2, 1)
    sources[0, 1], sources[0, 3] = NUM_PATCHES, 8
    corrupted = torch.tensor([[1, 3], [0, 5]])
    predicted = model(x, corruption=Corruption(corrupted, sources))

    tokens = model.patch_embed(x).detach().clone()  # [B, n, D]
    tokens[0, 3], tokens[0, 1] = tokens[0, 8], model.mask_token[0, 0].detach()
    tokens = torch.cat([model.cls_token.expand(2, 1, -1), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    outputs = model.patch_head(model.norm(tokens)[:, 1:])  # [B, n, X]
    expected = torch.stack([outputs[row, indices] for row, indices in enumerate(corrupted.tolist())])
    assert predicted.shape == (2, 2, 7)
    assert torch.allclose(predicted, expected, atol=1e-6)
    # Without a corruption it is a model without a head.
    assert torch.equal(model(x), model.features(x)) and model(x).shape == (2, 32)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_gradients_reach_every_parameter_and_a_masked_patch_hides_its_pixels(pool: str) -> None:
    model = build_model(ViTConfig(**{**vars(TINY), "pool": pool, "num_registers": 1}), 0)
    assert isinstance(model, ViT)
    nn.init.normal_(model.patch_head.weight)
    corruption = draw_corruption(
        NUM_PATCHES, 4, masked=1.0, replaced=0.0, seed=0, step=1, first_position=0, count=3
    )
    x = images(3).requires_grad_()
    model(x, corruption=corruption).square().sum().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name
    by_patch = x.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # [B, n]
    assert torch.equal(by_patch == 0, corruption.sources == NUM_PATCHES)


def test_fine_tuning_leaves_the_mask_token_and_the_patch_head_behind() -> None:
    plain = build_model(ViTConfig(**{**vars(TINY), "num_patch_outputs": 0}), 0)
    masked = {name for name, _ in random_model().named_parameters()}
    names = {name for name, _ in plain.named_parameters()}
    assert masked - names == {"mask_token", "patch_head.weight", "patch_head.bias"}
    assert {name for name in masked if is_backbone(name)} == names
    assert layer_of("mask_token") == 0 and layer_of("patch_head.weight") is None
    assert "patch_head.weight" in kernels(random_model()) and "mask_token" not in kernels(random_model())


def test_the_mask_token_starts_as_berts_embeddings_do_and_the_patch_head_at_0() -> None:
    model = build_model(ViTConfig(**{**vars(TINY), "width": 512}), 0)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.patch_head.weight.abs().max() == 0 and model.patch_head.bias.abs().max() == 0
