"""Histograms after each op of RandAugment, against closed forms of their own."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import convolve

from vitscale import rng
from vitscale.data.distortions import augreg_ops, deit_ops

SIZE = 224
# AugReg's strongest magnitude, 15, and DeiT's, 9: levels of 1.5 and 0.9.
OPS = {"augreg": augreg_ops(1.5, 1, (0.5, 0.5)), "deit": deit_ops(0.9, 1)}
Table = Callable[[np.ndarray], np.ndarray]


def noise() -> np.ndarray:
    """Levels of 64 to 191 in random places, the brighter the more often: [SIZE, SIZE, 3].

    The third channel is the negative of the two others.
    """
    level = np.floor(64 + 128 * np.sqrt(rng.uniform(SIZE * SIZE, 0, "demo"))).reshape(SIZE, SIZE)
    return np.stack([level, level, 255 - level], axis=2)


def grey(values: np.ndarray) -> np.ndarray:
    return values @ [0.299, 0.587, 0.114]


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return 255 * (values - low) / (high - low)


def equalized(values: np.ndarray) -> np.ndarray:
    """255 times the share of darker pixels, among those that are not of the brightest level."""
    channels = []
    for channel in np.moveaxis(values, 2, 0):
        darker = np.searchsorted(np.sort(channel, axis=None), channel)
        channels.append(255 * darker / np.sum(channel < channel.max()))
    return np.stack(channels, axis=2)


def away_from(factor: float, centre: Callable[[np.ndarray], object]) -> Table:
    return lambda values: centre(values) + factor * (values - centre(values))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of 3 x 3 pixels, the middle one five times; the border stays."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    result = values.copy()
    result[1:-1, 1:-1] = convolve(values, kernel[:, :, None])[1:-1, 1:-1]
    return result


def above(threshold: float, table: Table) -> Table:
    return lambda values: np.where(values < threshold, values, table(values))


def lifted(addition: int) -> Table:
    return lambda values: np.where(values < 128, values + addition, values)


TABLES: dict[tuple[str, str], Table] = {
    ("augreg", "AutoContrast"): stretched,
    ("augreg", "Equalize"): equalized,
    ("augreg", "Invert"): lambda values: 255 - values,
    ("augreg", "Posterize"): lambda values: values // 4 * 4,
    ("augreg", "Solarize"): above(128, lambda values: 255 - values),
    ("augreg", "Color"): away_from(2.8, lambda values: grey(values)[:, :, None]),
    ("augreg", "Contrast"): away_from(2.8, lambda _: SIZE * SIZE / 256),
    ("augreg", "Brightness"): away_from(2.8, lambda _: 0),
    ("augreg", "Sharpness"): away_from(2.8, smooth),
    ("augreg", "SolarizeAdd"): lifted(165),
    ("deit", "AutoContrast"): stretched,
    ("deit", "Equalize"): equalized,
    ("deit", "Invert"): lambda values: 255 - values,
    ("deit", "PosterizeIncreasing"): lambda values: values // 128 * 128,
    ("deit", "SolarizeIncreasing"): above(26, lambda values: 255 - values),
    ("deit", "SolarizeAdd"): lifted(99),
    ("deit", "ColorIncreasing"): away_from(1.81, lambda values: grey(values)[:, :, None]),
    ("deit", "ContrastIncreasing"): away_from(1.81, lambda values: grey(values).mean()),
    ("deit", "BrightnessIncreasing"): away_from(1.81, lambda _: 0),
    ("deit", "SharpnessIncreasing"): away_from(1.81, smooth),
}


@pytest.mark.parametrize(("flavour", "name"), TABLES)
def test_histograms_of_levels(flavour: str, name: str) -> None:
    before, table = noise(), TABLES[flavour, name]
    after = np.asarray(OPS[flavour][name](Image.fromarray(before.astype(np.uint8)))).astype(float)
    assert moved(after, np.clip(table(before), 0, 255)) < 1
    assert moved(after, before) > 1


def moved(first: np.ndarray, second: np.ndarray) -> float:
    """By how many levels a pixel differs, on average, from that of its rank in its channel."""
    ranked = [np.sort(values.reshape(-1, 3), axis=0) for values in (first, second)]
    return float(np.abs(ranked[0] - ranked[1]).mean())


def overlap(degrees: float) -> float:
    """The share of a square that is covered by itself, turned around its centre."""
    angle = math.radians(degrees)
    return 2 / (1 + math.sin(angle) + math.cos(angle))


FILLED: dict[tuple[str, str], float] = {
    ("augreg", "Rotate"): 1 - overlap(45),
    ("augreg", "ShearX"): 0.45 / 2,
    ("augreg", "ShearY"): 0.45 / 2,
    ("augreg", "TranslateX"): 150 / SIZE,
    ("augreg", "TranslateY"): 150 / SIZE,
    ("augreg", "Cutout"): (120 / SIZE) ** 2,
    ("deit", "Rotate"): 1 - overlap(27),
    ("deit", "ShearX"): 0.27 / 2,
    ("deit", "ShearY"): 0.27 / 2,
    ("deit", "TranslateXRel"): 0.45 * 0.9,
    ("deit", "TranslateYRel"): 0.45 * 0.9,
}


@pytest.mark.parametrize(("flavour", "name"), FILLED)
def test_shares_of_filled_pixels(flavour: str, name: str) -> None:
    white = Image.new("RGB", (SIZE, SIZE), "white")
    after, share = np.asarray(OPS[flavour][name](white)), FILLED[flavour, name]
    fill = (128, 128, 128) if flavour == "augreg" else (124, 116, 104)
    filled, kept = np.all(after == fill, axis=2).mean(), np.all(after == 255, axis=2).mean()
    assert filled == pytest.approx(share, abs=0.005) and kept == pytest.approx(1 - share, abs=0.01)


def test_every_op_has_a_closed_form() -> None:
    ops = {(flavour, name) for flavour, by_name in OPS.items() for name in by_name}
    assert ops == TABLES.keys() | FILLED.keys()
