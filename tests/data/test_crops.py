"""Random crops have the densities of height and width that closed forms say: 20,000 draws."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from vitscale import rng
from vitscale.data.crops import (
    CROP_ATTEMPTS,
    RANDOM_CROPS,
    proportional_crop,
    tensorflow_crop,
    torchvision_crop,
)
from vitscale.data.transforms import AugmentConfig, ViewKey, choose_box

AREAS, ASPECTS = (0.05, 0.5), (0.75, 4 / 3)  # every attempt fits into a square
SIDE, DRAWS = 100_000, 20_000
LARGEST_GAP = 1.95 / math.sqrt(DRAWS)  # Kolmogorov-Smirnov: exceeded by 1 in 1,000 samples
Below = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def aspects_of(name: str) -> np.ndarray:
    """1,000 equally likely ones."""
    middles = (np.arange(1_000) + 0.5) / 1_000
    low, high = ASPECTS
    if name == "torchvision":
        return np.exp(math.log(low) + middles * (math.log(high) - math.log(low)))
    return low + middles * (high - low)


def share_below(name: str, sides: np.ndarray, *, height: bool) -> np.ndarray:
    """The closed form: how likely the height (or width) is below a share of the image."""
    ratio = aspects_of(name)[:, None] if height else 1 / aspects_of(name)[:, None]  # the other side's
    if name == "tensorflow":  # the height is uniform for a given aspect ratio, and so the width
        low, high = (np.sqrt(area / ratio) for area in AREAS)
        return np.clip((sides - low) / (high - low), 0, 1).mean(axis=0)
    return np.clip((sides**2 * ratio - AREAS[0]) / (AREAS[1] - AREAS[0]), 0, 1).mean(axis=0)


@pytest.mark.parametrize("name", [name for name in RANDOM_CROPS if name != "proportional"])
def test_heights_and_widths_have_the_density_of_the_closed_form(name: str) -> None:
    draws = rng.uniform(4 * DRAWS, 0, "crop", 1).reshape(DRAWS, 4)
    crop = RANDOM_CROPS[name]
    boxes = np.array([crop(SIDE, SIDE, AREAS, ASPECTS, row) for row in draws]) / SIDE  # [DRAWS, 4]
    for column, is_height in ((2, True), (3, False)):
        sides = np.sort(boxes[:, column])
        gap = np.abs(share_below(name, sides, height=is_height) - (np.arange(DRAWS) + 0.5) / DRAWS)
        assert gap.max() < LARGEST_GAP, (name, column)
    for start, size in ((0, 2), (1, 3)):  # anywhere, as far as there is room
        places = np.sort(boxes[:, start] / (1 - boxes[:, size]))
        assert np.abs(places - (np.arange(DRAWS) + 0.5) / DRAWS).max() < LARGEST_GAP


def test_they_differ_by_what_they_are_said_to() -> None:
    """The mean area: its bounds' mean, except for TensorFlow's, whose heights are uniform."""
    draws = rng.uniform(4 * DRAWS, 0, "crop", 2).reshape(-1, 4)
    means = {}
    for name, crop in RANDOM_CROPS.items():
        boxes = np.array([crop(1_000, 1_000, AREAS, ASPECTS, row) for row in draws])
        means[name] = (boxes[:, 2] * boxes[:, 3]).mean() / 1e6
    low, high = map(math.sqrt, AREAS)
    uniform_height = (high**3 - low**3) / (3 * (high - low))
    assert means["inception"] == pytest.approx(0.275, abs=0.003)
    assert means["proportional"] == pytest.approx(0.275, abs=0.003)
    assert means["torchvision"] == pytest.approx(0.275, abs=0.003)
    assert means["tensorflow"] == pytest.approx(uniform_height, abs=0.003) and uniform_height < 0.24


@pytest.mark.parametrize("name", RANDOM_CROPS)
@pytest.mark.parametrize(("height", "width"), [(7, 5), (30, 300), (300, 30), (224, 224)])
def test_a_crop_lies_inside_the_image_and_keeps_to_its_bounds(name: str, height: int, width: int) -> None:
    for sample in range(300):
        draws = rng.uniform(4 * CROP_ATTEMPTS, 0, "crop", 3, sample)
        top, left, crop_height, crop_width = RANDOM_CROPS[name](height, width, (0.08, 1.0), ASPECTS, draws)
        assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width
        assert crop_height and crop_width
        if (crop_height, crop_width) != (height, width):
            assert 0.07 < crop_height * crop_width / (height * width) <= 1.01 or height == 7


def test_tensorflows_crop_by_hand() -> None:
    """100 x 100, aspect 1: heights 22 (sqrt of 5%) to 71, 50 of them; 78 - 1 places for 22."""

    def crop(height_draw: float, top_draw: float = 0.0) -> tuple[int, int, int, int]:
        return tensorflow_crop(100, 100, AREAS, (1.0, 1.0), np.array([height_draw, 0.5, top_draw, 0.999]))

    assert crop(0.0)[2:] == (23, 23)  # 22 x 22 is below 5%, so a pixel more
    assert crop(0.5)[2:] == (47, 47)  # 22 + int(0.5 x 50)
    assert crop(0.99)[2:] == (70, 70)  # 71 x 71 is above 50%, so a pixel less
    assert crop(0.5, 0.999) == (52, 52, 47, 47)  # never at the lower edge, 53
    # A wide crop of a narrow image: the height ends where the width does.
    assert tensorflow_crop(100, 40, (0.05, 1.0), (2.0, 2.0), np.array([0.999, 0.5, 0.0, 0.0]))[2:] == (20, 40)


def test_torchvisions_crop_falls_back_to_the_centre() -> None:
    draws = np.full(4 * CROP_ATTEMPTS, 0.999)
    assert torchvision_crop(100, 1_000, (0.9, 1.0), ASPECTS, draws) == (0, 433, 100, 133)
    assert torchvision_crop(1_000, 100, (0.9, 1.0), ASPECTS, draws) == (433, 0, 133, 100)


def test_a_proportional_crop_has_the_images_aspect_ratio() -> None:
    """6 of 7 parts of each side, in any of the 51 x 71 places."""

    def crop(height: int, width: int, place: float) -> tuple[int, int, int, int]:
        draws = np.array([0.5, 0.5, place, place])
        return proportional_crop(height, width, (36 / 49, 36 / 49), ASPECTS, draws)

    assert crop(350, 490, 0.0) == (0, 0, 300, 420) and crop(350, 490, 0.999) == (50, 70, 300, 420)
    assert crop(1, 700, 0.999) == (0, 100, 1, 600)
    assert proportional_crop(1, 700, (0.1, 0.1), ASPECTS, np.zeros(4)) == (0, 0, 1, 700)


def test_a_config_names_its_crop() -> None:
    boxes = {
        name: choose_box(AugmentConfig(crop=name), ViewKey(0, 0, 5), 400, 300)  # type: ignore[arg-type]
        for name in (*RANDOM_CROPS, "pad", "resize")
    }
    assert boxes["pad"] == boxes["resize"] == (0, 0, 400, 300)
    assert len({boxes[name] for name in RANDOM_CROPS}) == len(RANDOM_CROPS)
