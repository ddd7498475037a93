"""Views and augmentation: exact about geometry, keyed by the sample."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from make import jpeg
from PIL import Image
from torch import Tensor

from vitscale import rng
from vitscale.data.crops import inception_crop
from vitscale.data.decode import cut, decode
from vitscale.data.transforms import (
    AugmentConfig,
    ViewKey,
    choose_box,
    evaluation_view,
    finish_views,
    normalize,
    resize,
    resize_box,
)
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize

ASPECTS = (0.75, 4 / 3)


def augment(
    pixels: UInt8[np.ndarray, "h w 3"], config: AugmentConfig, size: ImageSize, key: ViewKey
) -> UInt8[Tensor, "3 H W"]:
    """A training view of a decoded image."""
    box = resize_box(cut(pixels, choose_box(config, key, *pixels.shape[:2])), size)
    return finish_views([box], config, [key])[0]


def test_resize_is_antialiased_bilinear() -> None:
    pixels = decode(jpeg(3, size=64))
    ours = resize(pixels, 16, 24).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillow).max() <= 1
    assert np.array_equal(resize(pixels, 64, 64).permute(1, 2, 0).numpy(), pixels)


def test_inception_crops_keep_to_area_and_aspect() -> None:
    areas = []
    for sample in range(300):
        top, left, height, width = inception_crop(
            90, 120, (0.2, 0.5), ASPECTS, rng.uniform(40, 0, "crop", 0, sample)
        )
        assert 0 <= top <= 90 - height and 0 <= left <= 120 - width
        assert 0.73 < width / height < 1.36
        areas.append(height * width / (90 * 120))
    assert 0.19 < min(areas) < 0.22 and 0.48 < max(areas) < 0.51 and abs(np.mean(areas) - 0.35) < 0.02


def test_an_image_that_no_crop_fits_is_taken_whole() -> None:
    draws = rng.uniform(40, 0, "crop", 0, 0)
    assert inception_crop(10, 1000, (0.9, 1.0), ASPECTS, draws) == (0, 0, 10, 1000)


def test_the_view_belongs_to_seed_epoch_and_sample() -> None:
    pixels = decode(jpeg(1, size=40))
    views = {
        key: augment(pixels, AugmentConfig(), 16, ViewKey(*key))
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1))
    }
    assert torch.equal(views[0, 0, 0], augment(pixels, AugmentConfig(), 16, ViewKey(0, 0, 0)))
    others = [view for key, view in views.items() if key != (0, 0, 0)]
    assert not any(torch.equal(views[0, 0, 0], other) for other in others)


def test_half_of_the_views_are_flipped_and_padding_shifts_by_up_to_its_size() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    plain = resize(pixels, 8, 8)
    views = [augment(pixels, AugmentConfig(crop="resize"), 8, ViewKey(0, 0, n)) for n in range(400)]
    flipped = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert flipped + sum(torch.equal(view, plain) for view in views) == 400 and 160 < flipped < 240
    config = AugmentConfig(crop="pad", pad=2, flip=False)
    padded = {augment(pixels, config, 8, ViewKey(0, 0, n)).numpy().tobytes() for n in range(400)}
    assert len(padded) == 25


@pytest.mark.parametrize("pad", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("fill", ["black", "grey"])
def test_many_views_at_once_are_those_of_each_sample_alone(pad: int, flip: bool, fill: str) -> None:
    """Each is the padded square, cut at its own draws and flipped by its own draw."""
    squares = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    config = AugmentConfig(crop="pad", pad=pad, flip=flip, pad_fill=fill)
    keys = [ViewKey(2**63 + 5, epoch=n % 3, sample=2**40 + n, view=n % 2) for n in range(40)]
    views = finish_views(list(squares), config, keys)
    assert views.is_contiguous()
    for view, square, key in zip(views, squares, keys, strict=True):
        padded = F.pad(
            torch.from_numpy(square).permute(2, 0, 1), [pad] * 4, value={"black": 0, "grey": 128}[fill]
        )
        top, left = (int(draw * (2 * pad + 1)) for draw in key.uniform(2, "crop"))
        expected = padded[:, top : top + 8, left : left + 8]
        if flip and key.uniform(1, "flip")[0] < 0.5:
            expected = expected.flip(-1)
        assert torch.equal(view, expected)
        assert torch.equal(view, finish_views([square], config, [key])[0])


def test_views_that_are_no_squares_are_shifted_and_flipped_within_their_own_sides() -> None:
    """Of 2 x 3 pixels, padded by 1 pixel: each of the 3 x 3 shifts, and its mirror image."""
    box = np.arange(1, 7, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
    config = AugmentConfig(crop="pad", pad=1)
    views = finish_views([box] * 300, config, [ViewKey(0, 0, sample) for sample in range(300)])
    assert views.shape == (300, 3, 2, 3)
    rows = [[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 0, 0, 0, 0]]
    windows = [[row[left : left + 3] for row in rows[top : top + 2]] for top in range(3) for left in range(3)]
    expected = {str(window) for window in windows} | {str([row[::-1] for row in w]) for w in windows}
    assert {str(view[0].tolist()) for view in views} == expected and len(expected) == 18


def test_a_crop_is_chosen_as_for_a_square_and_resized_to_both_sides() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    config = AugmentConfig(flip=False)
    for sample in range(5):
        key = ViewKey(0, 0, sample)
        top, left, height, width = choose_box(config, key, 40, 60)
        expected = resize(pixels[top : top + height, left : left + width], 6, 9)
        assert torch.equal(augment(pixels, config, (6, 9), key), expected)
    assert torch.equal(
        augment(pixels, AugmentConfig(crop="resize", flip=False), (6, 9), key), resize(pixels, 6, 9)
    )


def test_a_config_that_does_not_say_pads_black() -> None:
    pixels = np.full((8, 8, 3), 255, dtype=np.uint8)
    corners = {}
    for name, config in {
        "absent": AugmentConfig(crop="pad"),
        "black": AugmentConfig(crop="pad", pad_fill="black"),
        "grey": AugmentConfig(crop="pad", pad_fill="grey"),
    }.items():
        views = torch.stack([augment(pixels, config, 8, ViewKey(0, 0, n)) for n in range(20)])
        corners[name] = set(views.unique().tolist()) - {255}
    assert corners == {"absent": {0}, "black": {0}, "grey": {128}}
    grey = torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)
    assert normalize(grey, torch.float32).abs().max() < 0.004


def test_evaluation_views_and_normalisation() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255
    assert evaluation_view(pixels, "resize", 14).shape == (3, 14, 14)
    squeezed = evaluation_view(pixels, "resize_center", 14)
    assert torch.equal(squeezed, resize(pixels, 16, 16)[:, 1:15, 1:15])
    assert (evaluation_view(pixels, "center", 14) == 255).all()
    levels = normalize(torch.tensor([0, 255, 127], dtype=torch.uint8).reshape(1, 3, 1, 1), torch.float32)
    assert levels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.5 / 127.5])


@pytest.mark.usefixtures("without_type_checks")
def test_an_evaluation_view_takes_no_other_word_for_a_crop() -> None:
    with pytest.raises(AssertionError, match="centre"):
        evaluation_view(np.zeros((8, 8, 3), dtype=np.uint8), "centre", 8)  # pyright: ignore[reportArgumentType]


def test_evaluation_views_that_are_no_squares() -> None:
    """By hand. 14 x 7 of an image of 32 x 32: it is resized to cover 16 x 8, so to 16 x 16, and
    rows 1 to 15 and columns 4 to 11 are kept. 7 x 14 of 20 x 32 (8 x 16 to cover): 10 x 16.
    Squeezed, it is 16 x 8 before the crop.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert torch.equal(evaluation_view(pixels, "resize", (14, 7)), resize(pixels, 14, 7))
    tall = evaluation_view(pixels, "resize_center", (14, 7))
    assert torch.equal(tall, resize(pixels, 16, 8)[:, 1:15, 0:7])
    tall = evaluation_view(pixels, "center", (14, 7))
    assert torch.equal(tall, resize(pixels, 16, 16)[:, 1:15, 4:11])
    wide = evaluation_view(pixels[:20], "center", (7, 14))
    assert torch.equal(wide, resize(pixels[:20], 10, 16)[:, 1:8, 1:15])
    square = evaluation_view(pixels[:20], "center", (14, 14))
    assert torch.equal(square, evaluation_view(pixels[:20], "center", 14))


def test_the_middle_of_a_very_long_image_is_enough() -> None:
    """As a whole, 1 x 65,000 pixels of size 224 would be resized to 256 x 16,640,000: 13 GB."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 65_000, 3), dtype=np.uint8)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + (2 << 30), limits[1]))
    try:
        view = evaluation_view(pixels, "center", 224)
        turned = evaluation_view(pixels.transpose(1, 0, 2), "center", 224)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(view, evaluation_view(pixels[:, 32_450:32_550], "center", 224))
    assert torch.equal(turned, evaluation_view(pixels[:, 32_450:32_550].transpose(1, 0, 2), "center", 224))
    whole = resize(pixels[:, 32_400:32_600], 16, 3200)[:, 1:15, 1593:1607]
    assert torch.equal(evaluation_view(pixels[:, 32_400:32_600], "center", 14), whole)


def test_distortions_come_in_their_order_and_leave_the_size() -> None:
    pixels = decode(jpeg(1, size=40))
    plain = augment(pixels, AugmentConfig(), 32, ViewKey(0, 0, 7))
    for change in (
        {"randaugment": "augreg", "randaugment_ops": 3},
        {"randaugment": "deit", "randaugment_magnitude": 9.0, "randaugment_magnitude_std": 0.5},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
    ):
        view = augment(pixels, AugmentConfig(**change), 32, ViewKey(0, 0, 7))
        assert view.shape == (3, 32, 32) and view.dtype == torch.uint8 and view.is_contiguous()
        assert not torch.equal(view, plain)


@pytest.mark.parametrize(
    ("accepted", "refused", "sentence"),
    [
        ({"crop_area": (0.1, 1.0)}, {"crop_area": (0.0, 1.0)}, "must rise within"),
        ({"crop_area": (0.5, 0.5)}, {"crop_area": (0.5, 0.4)}, "must rise within"),
        ({"crop_area": (0.5, 1.0)}, {"crop_area": (0.5, 1.1)}, "must rise within"),
        ({"crop_aspect": (1.0, 1.0)}, {"crop_aspect": (1.0, 0.9)}, "must rise from above 0"),
        ({"crop_aspect": (0.1, 1.0)}, {"crop_aspect": (0.0, 1.0)}, "must rise from above 0"),
        ({"repeats": 1}, {"repeats": 0}, "augment.repeats"),
        ({"pad": 0}, {"pad": -1}, "augment.pad -1 must not be negative"),
        ({"color_jitter": 1.5}, {"color_jitter": -0.1}, "augment.color_jitter -0.1 must not be negative"),
        ({"mixup": 0.8}, {"mixup": -0.8}, "augment.mixup -0.8 and augment.cutmix 0.0 must not be"),
        ({"cutmix": 1.0}, {"cutmix": -1.0}, "augment.mixup 0.0 and augment.cutmix -1.0 must not be"),
        ({"cutmix_share": 1.0}, {"cutmix_share": 1.1}, "augment.cutmix_share 1.1 must lie in"),
        ({"random_erasing": 0.0}, {"random_erasing": -0.1}, "augment.random_erasing -0.1 must lie in"),
    ],
)
def test_an_augment_config_out_of_bounds_is_refused(accepted: dict, refused: dict, sentence: str) -> None:
    AugmentConfig(**accepted)
    with pytest.raises(ConfigError, match=sentence):
        AugmentConfig(**refused)


def test_only_deit_varies_the_magnitude() -> None:
    AugmentConfig(randaugment="deit", randaugment_magnitude_std=0.5)
    with pytest.raises(ConfigError, match="has no deviation"):
        AugmentConfig(randaugment="augreg", randaugment_magnitude_std=0.5)
