"""Mixup and cutmix: pairs, weights and boxes, in whatever way the global batch is cut."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from vitscale import rng
from vitscale.objectives.mixup import cutmix_boxes, draw_mixes, mix, pixel_weights

SIZE = 16
KINDS = [
    {"mixup": 0.8, "cutmix": 0.0, "switch": 0.5},
    {"mixup": 0.0, "cutmix": 1.0, "switch": 0.5},
    {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5},
]


def batch(rows: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, size, size, generator=generator)
    return images, torch.eye(10)[torch.randint(10, (rows,), generator=generator)]


def mixes(num_pairs: int, **kind: float) -> np.ndarray:
    """How the first pairs of a step mix, at 224 x 224."""
    return draw_mixes(range(num_pairs), 224, seed=1, step=0, **kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[32, 32], [16] * 4, [2] * 32, [6, 26, 2, 30]])
def test_any_even_cut_of_the_global_batch_mixes_alike(kind: dict, parts: list[int]) -> None:
    images, targets = batch(64)
    whole = mix(images, targets, **kind, seed=1, step=5, first_position=0)
    pieces, first = [], 0
    for rows in parts:
        cut = slice(first, first + rows)
        pieces.append(mix(images[cut], targets[cut], **kind, seed=1, step=5, first_position=first))
        first += rows
    assert torch.equal(torch.cat([images for images, _ in pieces]), whole[0])
    assert torch.equal(torch.cat([targets for _, targets in pieces]), whole[1])


def test_an_odd_cut_is_refused() -> None:
    images, targets = batch(4)
    mix(images[:2], targets[:2], **KINDS[0], seed=1, step=5, first_position=2)
    with pytest.raises(AssertionError):
        mix(images, targets, **KINDS[0], seed=1, step=5, first_position=1)
    with pytest.raises(AssertionError):
        mix(images[:3], targets[:3], **KINDS[0], seed=1, step=5, first_position=0)


def test_nothing_is_mixed_without_an_alpha() -> None:
    images, targets = batch(4)
    mixed = mix(images, targets, mixup=0.0, cutmix=0.0, switch=0.5, seed=1, step=5, first_position=0)
    assert mixed[0] is images and mixed[1] is targets


def test_mixup_is_a_weighted_mean_of_the_pair_in_images_and_targets() -> None:
    images, targets = batch(32)
    before = images.clone()
    mixed, mixed_targets = mix(images, targets, **KINDS[0], seed=1, step=5, first_position=64)
    weights = draw_mixes(range(32, 48), SIZE, **KINDS[0], seed=1, step=5)[:, 0]
    assert torch.equal(images, before)
    assert (weights >= 0.5).all() and len(set(weights)) == 16
    for pair, weight in enumerate(weights):
        for own, partner in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
            expected = weight * images[own] + (1 - weight) * images[partner]
            assert torch.allclose(mixed[own], expected, atol=1e-6)
            expected = weight * targets[own] + (1 - weight) * targets[partner]
            assert torch.allclose(mixed_targets[own], expected, atol=1e-6)


def test_cutmix_exchanges_one_box_and_its_share_of_the_target() -> None:
    images, _ = batch(64)
    targets = torch.eye(64)
    mixed, mixed_targets = mix(images, targets, **KINDS[1], seed=1, step=5, first_position=0)
    partner = torch.arange(64) ^ 1
    own = (mixed == images).all(1)
    assert (own | (mixed == images[partner]).all(1)).all()
    assert torch.equal(own, own[partner])
    shares = own.float().mean((1, 2))
    assert torch.allclose(mixed_targets[torch.arange(64), torch.arange(64)], shares, atol=1e-6)
    assert torch.allclose(mixed_targets[torch.arange(64), partner], 1 - shares, atol=1e-6)
    assert 0.1 < shares.mean() < 0.9
    for box in ~own:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_conserved_in_each_row_and_each_pair(kind: dict) -> None:
    images, targets = batch(64)
    _, mixed = mix(images, targets, **kind, seed=1, step=5, first_position=0)
    assert torch.allclose(mixed.sum(1), torch.ones(64), atol=1e-6)
    assert torch.allclose(mixed.unflatten(0, (-1, 2)).sum(1), targets.unflatten(0, (-1, 2)).sum(1), atol=1e-6)
    assert (mixed >= 0).all() and not torch.equal(mixed, targets)


def test_each_input_keeps_its_dtype() -> None:
    images, targets = batch(8)
    exact, _ = mix(images, targets, **KINDS[2], seed=1, step=5, first_position=0)
    low, low_targets = mix(images.bfloat16(), targets, **KINDS[2], seed=1, step=5, first_position=0)
    assert low.dtype == torch.bfloat16 and low_targets.dtype == torch.float32
    assert torch.allclose(low.float(), exact, atol=0.03)


def test_steps_seeds_and_pairs_differ() -> None:
    first = draw_mixes(range(8), SIZE, **KINDS[0], seed=1, step=5)[:, 0]
    others = [
        draw_mixes(range(8), SIZE, **KINDS[0], seed=1, step=6)[:, 0],
        draw_mixes(range(8), SIZE, **KINDS[0], seed=2, step=5)[:, 0],
        draw_mixes(range(8, 16), SIZE, **KINDS[0], seed=1, step=5)[:, 0],
    ]
    assert len(np.unique(np.concatenate([first, *others]))) == 32


def test_a_pair_draws_what_it_drew_in_earlier_versions() -> None:
    """Runs in progress continue with it: streams of its step and its number in the batch."""
    pairs, options = range(300, 400), {"switch": 0.5, "seed": 3, "step": 7}
    drawn, centres = (
        np.stack([rng.uniform(2, 3, domain, 7, pair) for pair in pairs]) for domain in ("mixup", "cutmix")
    )
    lam = scipy.special.betaincinv(1.0, 1.0, drawn[:, 1])
    mixed = draw_mixes(pairs, 32, mixup=1.0, cutmix=0.0, **options)
    assert np.array_equal(mixed[:, 0], np.maximum(lam, 1 - lam))
    cut = draw_mixes(pairs, 32, mixup=0.0, cutmix=1.0, **options)
    assert np.array_equal(cut[:, 2:], cutmix_boxes(lam, centres, 32))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixup_weights_are_of_the_folded_beta_distribution(alpha: float) -> None:
    weights = mixes(4000, mixup=alpha, cutmix=0.0, switch=0.5)[:, 0]
    fit = scipy.stats.kstest(
        2 * (weights - 0.5), lambda x: 1 - 2 * scipy.stats.beta.cdf((1 - x) / 2, alpha, alpha)
    )
    assert fit.pvalue > 1e-3
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean((weights - 0.5) ** 2) - variance) < 0.1 * variance


def test_switch_is_the_share_of_cutmix() -> None:
    for switch in (0.0, 0.3, 1.0):
        outside = mixes(2000, mixup=0.8, cutmix=1.0, switch=switch)[:, 1]
        assert abs(np.mean(outside == 1) - switch) < 0.04
    assert (mixes(100, mixup=0.0, cutmix=1.0, switch=0.0)[:, 1] == 1).all()
    assert (mixes(100, mixup=0.8, cutmix=0.0, switch=1.0)[:, 3] == 0).all()


def test_cutmix_uses_its_own_alpha() -> None:
    """At alpha 50 every lambda is near a half: boxes of 0.7 of the side unless cut."""
    rows = mixes(500, mixup=0.1, cutmix=50.0, switch=0.5)
    cut = rows[rows[:, 1] == 1]
    widest = np.maximum(cut[:, 3] - cut[:, 2], cut[:, 5] - cut[:, 4]).max()
    assert abs(widest / 224 - 0.5**0.5) < 0.1
    assert np.median(rows[rows[:, 1] != 1][:, 0]) > 0.99


def test_cutmix_boxes_have_the_right_side_centre_and_edge() -> None:
    lam = np.array([0.75, 0.75, 0.0, 1.0])
    centres = np.array([[0.5, 0.5], [0.0, 0.999], [0.5, 0.5], [0.5, 0.5]])
    boxes = cutmix_boxes(lam, centres, 100)
    assert boxes.tolist() == [[25, 75, 25, 75], [0, 25, 74, 100], [0, 100, 0, 100], [50, 50, 50, 50]]


def test_cutmix_boxes_have_the_aspect_ratio_of_the_image() -> None:
    lam, centres = np.array([0.75, 0.75]), np.array([[0.5, 0.5], [0.0, 0.999]])
    assert cutmix_boxes(lam, centres, (40, 100)).tolist() == [[10, 30, 25, 75], [0, 10, 74, 100]]
    weights = pixel_weights(torch.tensor([[0.7, 1.0, 2.0, 3.0, 5.0]]), (2, 5))
    assert torch.equal(weights, torch.tensor([[[0.7, 0.7, 0.7, 0.7, 0.7], [0.7, 0.7, 0.7, 0.0, 0.0]]]))


def test_mixing_images_that_are_no_squares_counts_their_pixels() -> None:
    """An image of ones and one of zeros: its mean is the weight of its target."""
    images = torch.tensor([1.0, 0.0]).repeat(32)[:, None, None, None].expand(64, 3, 6, 10)
    targets = torch.eye(2).repeat(32, 1)
    for kind in ({"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.8, "cutmix": 0.0}):
        mixed, weights = mix(images, targets, **kind, switch=0.5, seed=1, step=5, first_position=0)
        assert torch.allclose(mixed.mean((1, 2, 3)), weights[:, 0], atol=1e-6)
        assert 0 < weights[0, 0] < 1 or len(weights[:, 0].unique()) > 10


def test_cutmix_boxes_are_placed_uniformly() -> None:
    rows = mixes(3000, mixup=0.0, cutmix=1.0, switch=0.5)
    inner = rows[(rows[:, 2] > 0) & (rows[:, 3] < 224) & (rows[:, 3] - rows[:, 2] < 60)]
    centres = (inner[:, 2] + inner[:, 3]) / 2 / 224
    assert len(inner) > 150 and abs(centres.mean() - 0.5) < 0.07
    # A target's corrected weight is at least the drawn lambda, whose mean is a half.
    assert 0.55 < rows[:, 0].mean() < 0.75
