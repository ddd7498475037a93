"""Distortions against Pillow's own calls, and their draws against their distributions."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vitscale import rng
from vitscale.data import distortions
from vitscale.data.distortions import augreg_ops, color_jitter, deit_ops, rand_augment, random_erasing

CENTRE = (0.5, 0.5)
GREY = (128, 128, 128)
MEAN = (124, 116, 104)
# fmt: off
AUGREG_ORDER = [
    "AutoContrast", "Equalize", "Invert", "Rotate",
    "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY",
    "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
]
DEIT_ORDER = [
    "AutoContrast", "Equalize", "Invert", "Rotate",
    "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "ColorIncreasing",
    "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX",
    "ShearY", "TranslateXRel", "TranslateYRel",
]
# fmt: on


def picture(size: int = 224) -> Image.Image:
    """A smooth random picture without pure black or white."""
    words = rng.uniform(7 * 7 * 3, 0, "demo").reshape(7, 7, 3)
    return Image.fromarray((30 + 190 * words).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def ramp() -> Image.Image:
    """All 256 values, in reading order, the same in each channel."""
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(values(first), values(second))


def choose(name: str, order: list[str]) -> float:
    return (order.index(name) + 0.5) / len(order)


def test_each_flavour_has_its_ops_in_their_order() -> None:
    assert list(augreg_ops(1.0, 1, CENTRE)) == AUGREG_ORDER
    assert list(deit_ops(0.9, 1)) == DEIT_ORDER


@pytest.mark.parametrize("ops", [augreg_ops(1.0, 1, CENTRE), deit_ops(0.9, 1)])
def test_ops_without_a_level_are_pillows(ops: dict) -> None:
    image = picture()
    assert same(ops["AutoContrast"](image), ImageOps.autocontrast(image))
    assert same(ops["Equalize"](image), ImageOps.equalize(image))
    assert np.array_equal(values(ops["Invert"](image)), 255 - values(image))


@pytest.mark.parametrize(("magnitude", "bits"), [(0, 1), (2, 1), (5, 2), (10, 4), (15, 6), (20, 8), (25, 1)])
def test_augreg_posterize_is_milder_at_higher_magnitudes(magnitude: int, bits: int) -> None:
    step = 2 ** (8 - bits)
    result = values(augreg_ops(magnitude / 10, 1, CENTRE)["Posterize"](ramp()))
    assert np.array_equal(result, values(ramp()) // step * step)


@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (5, 128), (9, 230), (10, 0), (15, 128), (20, 0)]
)
def test_augreg_solarize_wraps_its_threshold_at_256(magnitude: int, threshold: int) -> None:
    before = values(ramp())
    after = values(augreg_ops(magnitude / 10, 1, CENTRE)["Solarize"](ramp()))
    assert np.array_equal(after, np.where(before < threshold, before, 255 - before))


@pytest.mark.parametrize(("magnitude", "addition"), [(0, 0), (9, 99), (10, 110), (20, 220)])
def test_solarize_add_lifts_the_values_below_128(magnitude: int, addition: int) -> None:
    before = values(ramp())
    expected = np.where(before < 128, np.minimum(before + addition, 255), before)
    assert np.array_equal(values(augreg_ops(magnitude / 10, 1, CENTRE)["SolarizeAdd"](ramp())), expected)
    if magnitude <= 10:
        assert np.array_equal(values(deit_ops(magnitude / 10, 1)["SolarizeAdd"](ramp())), expected)


@pytest.mark.parametrize(("magnitude", "factor"), [(0, 0.1), (5, 1.0), (10, 1.9), (20, 3.7)])
def test_augreg_enhances_by_a_tenth_to_four(magnitude: int, factor: float) -> None:
    image, ops = picture(), augreg_ops(magnitude / 10, 1, CENTRE)
    assert same(ops["Color"](image), ImageEnhance.Color(image).enhance(factor))
    assert same(ops["Brightness"](image), ImageEnhance.Brightness(image).enhance(factor))
    assert same(ops["Sharpness"](image), ImageEnhance.Sharpness(image).enhance(factor))
    away_from_196 = np.clip(196 + factor * (values(image) - 196), 0, 255)
    assert np.abs(values(ops["Contrast"](image)) - away_from_196).max() <= 1
    away_from_white = np.clip(255 + factor * (values(picture(300)) - 255), 0, 255)
    assert np.abs(values(ops["Contrast"](picture(300))) - away_from_white).max() < 1


def test_sharpness_above_one_sharpens_and_below_smooths() -> None:
    image, smooth = picture(), picture().filter(ImageFilter.SMOOTH)
    assert same(deit_ops(0.0, 1)["SharpnessIncreasing"](image), image)
    softer = values(deit_ops(1.0, -1)["SharpnessIncreasing"](image))
    assert np.abs(softer - values(smooth)).mean() < np.abs(values(image) - values(smooth)).mean()


@pytest.mark.parametrize(
    ("level", "sign", "factor"), [(0.0, 1, 1.0), (0.9, 1, 1.81), (0.9, -1, 0.19), (1.0, -1, 0.1)]
)
def test_deit_enhances_away_from_one(level: float, sign: int, factor: float) -> None:
    image, ops = picture(), deit_ops(level, sign)
    enhancers = [ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness]
    names = ["ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"]
    for name, enhancer in zip(names, enhancers, strict=True):
        assert np.abs(values(ops[name](image)) - values(enhancer(image).enhance(factor))).max() <= 1


@pytest.mark.parametrize(
    ("level", "bits", "threshold"), [(0.0, 4, 256), (0.5, 2, 128), (0.7, 2, 77), (0.9, 1, 26), (1.0, 1, 0)]
)
def test_deit_posterize_and_solarize_increase(level: float, bits: int, threshold: int) -> None:
    before, ops, step = values(ramp()), deit_ops(level, 1), 2 ** (8 - bits)
    assert np.array_equal(values(ops["PosterizeIncreasing"](ramp())), before // step * step)
    solarized = np.where(before < threshold, before, 255 - before)
    assert np.array_equal(values(ops["SolarizeIncreasing"](ramp())), solarized)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("magnitude", "pixels"), [(0, 0), (10, 100), (15, 150)])
def test_augreg_translates_by_ten_pixels_a_level_and_fills_with_grey(magnitude, pixels, sign) -> None:
    before, ops = values(picture()), augreg_ops(magnitude / 10, sign, CENTRE)
    expected = np.full_like(before, 128)
    kept, moved = slice(0, 224 - pixels), slice(pixels, 224)
    expected[:, kept if sign > 0 else moved] = before[:, moved if sign > 0 else kept]
    assert np.array_equal(values(ops["TranslateX"](picture())), expected)
    transposed = picture().transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(values(ops["TranslateY"](transposed)).transpose(1, 0, 2), expected)


def test_deit_translates_by_up_to_45_percent_and_fills_with_the_mean() -> None:
    before, ops = values(picture(200)), deit_ops(1.0, 1)
    moved = values(ops["TranslateXRel"](picture(200)))
    assert np.array_equal(moved[:, :110], before[:, 90:])
    assert (moved[:, 110:] == MEAN).all()
    moved = values(ops["TranslateYRel"](picture(200).crop((0, 0, 50, 200))))
    assert np.array_equal(moved[:110], before[90:, :50])
    assert (moved[110:] == MEAN).all()


@pytest.mark.parametrize(
    ("ops", "fill", "resample"),
    [
        (augreg_ops, GREY, Image.Resampling.NEAREST),
        (lambda level, sign, _: deit_ops(level, sign), MEAN, Image.Resampling.BICUBIC),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_is_thirty_degrees_and_shear_three_tenths_at_level_one(ops, fill, resample, sign) -> None:
    image, made = picture(), ops(1.0, sign, CENTRE)
    assert same(made["Rotate"](image), image.rotate(sign * 30, resample, fillcolor=fill))
    sheared = values(made["ShearX"](Image.new("RGB", (100, 100), "white")))
    outside = (sheared == fill).all(axis=2).sum(axis=1)  # the number of filled pixels in each row
    assert outside[0] <= 1 and abs(outside[99] - 30) <= 1 and abs(outside[50] - 15) <= 1
    assert (sheared[99, 0 if sign < 0 else 99] == fill).all()
    transposed = values(made["ShearY"](Image.new("RGB", (100, 100), "white")))
    assert np.array_equal(transposed.transpose(1, 0, 2), sheared)


@pytest.mark.parametrize(
    ("centre", "rows", "columns"),
    [((0.5, 0.5), (72, 152), (72, 152)), ((0.0, 0.999), (0, 40), (183, 224)), ((0.1, 0.0), (0, 62), (0, 40))],
)
def test_cutout_greys_eighty_pixels_around_its_centre(centre, rows, columns) -> None:
    expected = values(picture())
    expected[rows[0] : rows[1], columns[0] : columns[1]] = 128
    image = picture()
    assert np.array_equal(values(augreg_ops(1.0, 1, centre)["Cutout"](image)), expected)
    assert same(image, picture())


def test_augreg_applies_every_chosen_op_in_turn() -> None:
    draws = np.array([choose("Rotate", AUGREG_ORDER), 0.7, 0, 0, choose("Color", AUGREG_ORDER), 0.1, 0, 0])
    turned = picture().rotate(30, fillcolor=GREY)
    expected = ImageEnhance.Color(turned).enhance(1.9)
    assert same(rand_augment(picture(), "augreg", 2, 10.0, 0.0, draws), expected)
    draws[1] = 0.3
    assert not same(rand_augment(picture(), "augreg", 2, 10.0, 0.0, draws), expected)


def test_augreg_cuts_out_where_its_draws_say() -> None:
    draws = np.array([choose("Cutout", AUGREG_ORDER), 0.0, 0.1, 0.9])
    expected = augreg_ops(1.0, 1, (0.1, 0.9))["Cutout"](picture())
    assert same(rand_augment(picture(), "augreg", 1, 10.0, 0.0, draws), expected)


def test_augreg_has_no_magnitude_std() -> None:
    rand_augment(picture(8), "augreg", 1, 10.0, 0.0, np.zeros(4))
    with pytest.raises(ValueError, match="magnitude_std"):
        rand_augment(picture(8), "augreg", 1, 10.0, 0.5, np.zeros(4))


def test_every_op_of_augreg_is_chosen_alike_and_never_skipped() -> None:
    image, made = picture(32), {}
    for choice in range(16):
        made[np.asarray(augreg_ops(0.3, 1, CENTRE)[AUGREG_ORDER[choice]](image)).tobytes()] = choice
    assert len(made) == 16
    draws = rng.uniform(1600, 0, "randaugment")
    counts = np.zeros(16, dtype=int)
    for draw in draws:
        result = rand_augment(image, "augreg", 1, 3.0, 0.0, np.array([draw, 0.9, *CENTRE]))
        counts[made[result.tobytes()]] += 1
    assert (counts > 60).all() and (counts < 145).all()


def test_half_of_the_deit_ops_are_applied() -> None:
    image, invert = picture(16), choose("Invert", DEIT_ORDER)
    draws = rng.uniform(2000, 0, "randaugment").reshape(-1, 2)
    inverted = [
        not same(rand_augment(image, "deit", 1, 9.0, 0.5, np.array([invert, *pair, 0.5])), image)
        for pair in draws
    ]
    assert inverted == [bool(pair[0] < 0.5) for pair in draws]
    assert abs(np.mean(inverted) - 0.5) < 0.05


def test_the_deit_magnitude_is_normal_and_clipped_to_ten() -> None:
    image = Image.new("RGB", (1, 1), (0, 0, 0))
    op = choose("SolarizeAdd", DEIT_ORDER)

    def added(magnitude: float, magnitude_std: float, quantile: float) -> int:
        draws = np.array([op, 0.0, quantile, 0.0])
        return rand_augment(image, "deit", 1, magnitude, magnitude_std, draws).getpixel((0, 0))[0]

    assert added(9.0, 0.5, 0.5) == 99
    assert added(9.0, 0.5, 0.841345) == int(9.5 * 11)
    assert added(9.0, 0.5, 0.999) == 110
    assert added(1.0, 0.5, 0.0) == 0
    assert added(9.0, 0.0, 0.0) == added(9.0, 0.0, 0.9) == 99
    quantiles = rng.uniform(2000, 1, "randaugment")
    magnitudes = np.array([added(5.0, 1.0, quantile) for quantile in quantiles]) / 11
    assert abs(magnitudes.mean() - 5) < 0.1 and abs(magnitudes.std() - 1) < 0.06


def test_the_deit_sign_is_its_last_draw() -> None:
    op = choose("TranslateXRel", DEIT_ORDER)
    left = rand_augment(picture(), "deit", 1, 9.0, 0.0, np.array([op, 0, 0.5, 0.9]))
    right = rand_augment(picture(), "deit", 1, 9.0, 0.0, np.array([op, 0, 0.5, 0.1]))
    assert same(left, deit_ops(0.9, 1)["TranslateXRel"](picture()))
    assert same(right, deit_ops(0.9, -1)["TranslateXRel"](picture()))


@pytest.mark.parametrize("flavour", ["augreg", "deit"])
@pytest.mark.parametrize("magnitude", [0.0, 9.0, 10.0, 20.0])
def test_every_draw_gives_an_image_of_the_same_size_and_draws_decide_it(flavour, magnitude) -> None:
    image = picture(33)
    for draws in rng.uniform(4 * 3 * 60, 2, "randaugment").reshape(60, 12):
        first = rand_augment(image, flavour, 3, magnitude, 0.0, draws)
        assert first.size == (33, 33) and first.mode == "RGB"
        assert same(first, rand_augment(image, flavour, 3, magnitude, 0.0, draws))
    assert same(image, picture(33))


def test_a_wrong_number_of_draws_is_refused() -> None:
    image = picture(8)
    rand_augment(image, "deit", 2, 9.0, 0.5, np.zeros(8))
    with pytest.raises(ValueError):
        rand_augment(image, "deit", 2, 9.0, 0.5, np.zeros(4))
    color_jitter(image, 0.3, np.zeros(4))
    with pytest.raises(ValueError):
        color_jitter(image, 0.3, np.zeros(5))


def test_color_jitter_is_the_three_enhancers_in_a_drawn_order() -> None:
    image, draws = picture(), np.array([0.25, 0.5, 1 - 2**-53, 0.0])
    expected = ImageEnhance.Brightness(image).enhance(0.85)
    expected = ImageEnhance.Contrast(expected).enhance(1.0)
    expected = ImageEnhance.Color(expected).enhance(1.3)
    assert np.abs(values(color_jitter(image, 0.3, draws)) - values(expected)).max() <= 1
    draws = np.array([0.1, 0.9, 0.2, 0.0])
    results = {
        color_jitter(image, 0.4, np.array([*draws[:3], order])).tobytes() for order in np.arange(6) / 6
    }
    assert len(results) == 6
    assert same(color_jitter(image, 0.0, draws), image)


def test_color_jitter_never_scales_below_zero() -> None:
    assert (values(color_jitter(picture(), 1.5, np.zeros(4))) == 0).all()
    without_color = values(color_jitter(picture(), 1.5, np.array([0.4, 0.4, 0.0, 0.0])))
    assert without_color.std() > 10 and np.ptp(without_color, axis=2).max() == 0


def test_random_erasing_replaces_its_box_and_nothing_else() -> None:
    view = torch.full((3, 64, 64), 7, dtype=torch.uint8)
    draws = rng.uniform(distortions.RANDOM_ERASING_DRAWS, 3, "erase")
    draws[0] = 0.2
    top, left, height, width = distortions.erasing_box(64, draws[1:])
    erased = random_erasing(view, 0.25, draws, 11)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert (erased[:, outside] == 7).all() and (view == 7).all()
    assert (erased[:, ~outside] != 7).float().mean() > 0.98
    assert torch.equal(erased, random_erasing(view, 0.25, draws, 11))
    assert not torch.equal(erased, random_erasing(view, 0.25, draws, 12))
    draws[0] = 0.25
    assert torch.equal(random_erasing(view, 0.25, draws, 11), view)


def test_a_quarter_of_the_views_is_erased() -> None:
    view = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    draws = [rng.uniform(distortions.RANDOM_ERASING_DRAWS, 0, "erase", 0, sample) for sample in range(1500)]
    erased = [not torch.equal(random_erasing(view, 0.25, draw, 1), view) for draw in draws]
    assert abs(np.mean(erased) - 0.25) < 0.04


def test_erased_boxes_keep_to_their_areas_and_aspects() -> None:
    size, draws = 1000, rng.uniform(3000 * 40, 4, "erase").reshape(3000, 40)
    top, left, height, width = np.array([distortions.erasing_box(size, draw) for draw in draws]).T
    areas, aspects = height * width / size**2, np.log(height / width)
    assert areas.min() > 0.0199 and areas.max() < 0.3334
    assert abs(areas.mean() - (0.02 + 1 / 3) / 2) < 0.01
    assert np.abs(aspects).max() <= np.log(1 / 0.3) + 0.02
    assert abs(aspects.mean()) < 0.05 and abs(aspects.std() - np.log(1 / 0.3) / np.sqrt(3)) < 0.03
    assert (top >= 0).all() and (top + height <= size).all() and (left + width <= size).all()
    places = left / (size - width)
    assert abs(places.mean() - 0.5) < 0.02 and abs(places.std() - 12**-0.5) < 0.02


def test_erased_boxes_of_images_that_are_no_squares_lie_within_them() -> None:
    draws = rng.uniform(3000 * 40, 4, "erase").reshape(3000, 40)
    top, left, height, width = np.array([distortions.erasing_box((40, 100), draw) for draw in draws]).T
    assert ((top + height <= 40) & (left + width <= 100) & (height < 40)).all()
    assert (width > 40).any() and left.max() > 80 and 0 < top.max() < 40
    assert (height * width)[height > 0].min() > 0.015 * 4000 and (height * width).max() < 0.34 * 4000
    view = torch.full((3, 4, 10), 7, dtype=torch.uint8)
    erased = random_erasing(view, 1.0, np.array([0.0, *draws[0]]), 1)
    assert erased.shape == view.shape and not torch.equal(erased, view)


def test_a_box_that_does_not_fit_is_tried_again() -> None:
    tall = [1 - 2**-53, 1 - 2**-53, 0.0, 0.0]  # a third of the square, 1.05 times its height
    assert distortions.erasing_box(100, np.array([*tall, 0.0, 0.5, 0.0, 1 - 2**-53])) == (0, 86, 14, 14)
    assert distortions.erasing_box(100, np.array(tall * 10)) == (0, 0, 0, 0)


def test_erasing_noise_is_normal_around_the_imagenet_mean() -> None:
    view = torch.zeros(3, 300, 300, dtype=torch.uint8)
    draws = np.zeros(distortions.RANDOM_ERASING_DRAWS)
    draws[1:5] = [1 - 2**-53, 0.5, 0, 0]
    top, left, height, width = distortions.erasing_box(300, draws[1:])
    noise = random_erasing(view, 1.0, draws, 5)[:, top : top + height, left : left + width].double()
    assert height * width > 29000
    # The median and one deviation on each side, which the clipping to pixels leaves alone.
    levels = torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.double)
    quantiles = torch.quantile(noise.flatten(1), levels, dim=1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double() * 255
    assert (quantiles - torch.stack([mean - std, mean, mean + std])).abs().max() < 1.5
    assert noise.min() == 0 and noise.max() == 255
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.03
