"""Distortions of an image after crop and flip: RandAugment, colour jitter and random erasing.

Each function is pure: its random numbers come as `draws`, uniform in [0, 1), so that the caller
keys them by sample and a test can choose them. The code that the published results were trained
with is followed, its oddities included, since the strengths in the papers' tables are meant for
that code. The pixels are Pillow's work.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import scipy.special
import torch
from jaxtyping import Float64, UInt8
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitscale import rng
from vitscale.image_size import ImageSize, sides

RAND_AUGMENT_DRAWS_PER_OP = 4
COLOR_JITTER_DRAWS = 4
ERASING_ATTEMPTS = 10
RANDOM_ERASING_DRAWS = 1 + 4 * ERASING_ATTEMPTS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Op = Callable[[Image.Image], Image.Image]
Enhancer = type[ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Sharpness]


class Edges(NamedTuple):
    """How a geometric op samples pixels, and the colour of those from outside the image."""

    resample: Image.Resampling
    fill: tuple[int, int, int]


AUGREG_EDGES = Edges(Image.Resampling.NEAREST, (128, 128, 128))
DEIT_EDGES = Edges(Image.Resampling.BICUBIC, (124, 116, 104))


def rand_augment(
    image: Image.Image,
    flavour: Literal["augreg", "deit"],
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    draws: Float64[np.ndarray, " n"],
) -> Image.Image:
    """`image` (RGB) after `num_ops` ops, each chosen uniformly with replacement.

    draws: RAND_AUGMENT_DRAWS_PER_OP for each op. Source: Cubuk et al., "RandAugment".

    "augreg" is randaug(num_ops, magnitude) of "How to train your ViT?" (big_vision's
    pp/autoaugment.py). Every chosen op is applied, since that code draws a `prob` in 0.2..0.8
    and then never uses it. The magnitude may exceed 10 (see `augreg_ops`) and is fixed, so
    magnitude_std must be 0 (ValueError).

    "deit" is DeiT's, timm's rand-m{magnitude}-mstd{magnitude_std}-inc1. An op is applied with
    probability 0.5, at a magnitude drawn from a normal distribution and clipped to [0, 10].
    """
    if flavour == "augreg" and magnitude_std:
        raise ValueError(
            f"the augreg RandAugment has a fixed magnitude: magnitude_std {magnitude_std} must be 0"
        )
    for op_draws in draws.reshape(num_ops, RAND_AUGMENT_DRAWS_PER_OP).tolist():
        if flavour == "augreg":
            choice, sign, row, column = op_draws
            ops = augreg_ops(magnitude / 10, _sign(sign), (row, column))
        else:
            choice, applied, quantile, sign = op_draws
            if applied >= 0.5:
                continue
            # A draw of 0 would be an infinite deviation, and NaN times a magnitude_std of 0.
            normal = float(scipy.special.ndtri(max(quantile, 2.0**-54)))
            ops = deit_ops(min(max(magnitude + magnitude_std * normal, 0), 10) / 10, _sign(sign))
        image = list(ops.values())[int(choice * len(ops))](image)
    return image


def _sign(draw: float) -> int:
    return -1 if draw < 0.5 else 1


def augreg_ops(level: float, sign: int, centre: tuple[float, float]) -> dict[str, Op]:
    """The 16 ops of AugReg's RandAugment at `level` = M / 10, in the order of the draws.

    sign: 1 or -1, for the ops that go either way. centre: (row, column) of the cutout in [0,
    1). Translation and cutout are in pixels, meant for images of 224. A level may exceed 1:

    - Posterize keeps int(4 level) bits, so it is milder the higher the level: 4 bits at M = 10,
      6 at 15, all at 20. Where that is not in 1..8 (M < 2.5, M >= 22.5), TensorFlow's shift,
      capped at 7, keeps 1 bit.
    - Solarize's threshold int(256 level) became a uint8, which wrapped it: 0 at M = 10 and 20,
      which is Invert, and 128 at M = 15.
    - The factor of Color, Contrast, Brightness and Sharpness extrapolates, pixels are clipped:
      0.1, 1.9, 2.8 and 3.7 at M = 0, 10, 15 and 20.
    """
    factor = 1.8 * level + 0.1
    shear, pixels = sign * 0.3 * level, sign * 100 * level
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Rotate": functools.partial(_rotate, degrees=sign * 30 * level, edges=AUGREG_EDGES),
        "Posterize": functools.partial(_posterize, bits=int(level * 4)),
        "Solarize": functools.partial(ImageOps.solarize, threshold=int(level * 256) % 256),
        "Color": functools.partial(_enhance, enhancer=ImageEnhance.Color, factor=factor),
        "Contrast": functools.partial(_contrast_from_size, factor=factor),
        "Brightness": functools.partial(_enhance, enhancer=ImageEnhance.Brightness, factor=factor),
        "Sharpness": functools.partial(_enhance, enhancer=ImageEnhance.Sharpness, factor=factor),
        "ShearX": functools.partial(_shear, x=shear, y=0.0, edges=AUGREG_EDGES),
        "ShearY": functools.partial(_shear, x=0.0, y=shear, edges=AUGREG_EDGES),
        "TranslateX": functools.partial(_translate, x=pixels, y=0.0, edges=AUGREG_EDGES),
        "TranslateY": functools.partial(_translate, x=0.0, y=pixels, edges=AUGREG_EDGES),
        "Cutout": functools.partial(_cutout, half_side=int(level * 40), centre=centre),
        "SolarizeAdd": functools.partial(_solarize_add, addition=int(level * 110)),
    }


def deit_ops(level: float, sign: int) -> dict[str, Op]:
    """The 15 ops of timm's increasing set, in the order of the draws.

    level: magnitude / 10, in [0, 1]. sign: 1 or -1, for the ops that go either way. Geometric
    ops are bicubic, since DeiT passes its train_interpolation on, and fill with the ImageNet
    mean. Deviation: PosterizeIncreasing keeps at least 1 bit; timm's 0 bits at level 1 are a
    black image or an error, depending on the version of Pillow.
    """
    factor = max(0.1, 1 + sign * 0.9 * level)
    shear, shift = sign * 0.3 * level, sign * 0.45 * level
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Rotate": functools.partial(_rotate, degrees=sign * 30 * level, edges=DEIT_EDGES),
        "PosterizeIncreasing": functools.partial(_posterize, bits=4 - int(level * 4)),
        "SolarizeIncreasing": functools.partial(ImageOps.solarize, threshold=256 - int(level * 256)),
        "SolarizeAdd": functools.partial(_solarize_add, addition=int(level * 110)),
        "ColorIncreasing": functools.partial(_enhance, enhancer=ImageEnhance.Color, factor=factor),
        "ContrastIncreasing": functools.partial(_enhance, enhancer=ImageEnhance.Contrast, factor=factor),
        "BrightnessIncreasing": functools.partial(_enhance, enhancer=ImageEnhance.Brightness, factor=factor),
        "SharpnessIncreasing": functools.partial(_enhance, enhancer=ImageEnhance.Sharpness, factor=factor),
        "ShearX": functools.partial(_shear, x=shear, y=0.0, edges=DEIT_EDGES),
        "ShearY": functools.partial(_shear, x=0.0, y=shear, edges=DEIT_EDGES),
        "TranslateXRel": functools.partial(_translate_relative, x=shift, y=0.0, edges=DEIT_EDGES),
        "TranslateYRel": functools.partial(_translate_relative, x=0.0, y=shift, edges=DEIT_EDGES),
    }


def _rotate(image: Image.Image, degrees: float, edges: Edges) -> Image.Image:
    return image.rotate(degrees, edges.resample, fillcolor=edges.fill)


def _shear(image: Image.Image, x: float, y: float, edges: Edges) -> Image.Image:
    """Take each pixel from x * row further right, and y * column further down."""
    return _affine(image, (1.0, x, 0.0, y, 1.0, 0.0), edges)


def _translate(image: Image.Image, x: float, y: float, edges: Edges) -> Image.Image:
    """Take each pixel from `x` pixels to its right and `y` below it."""
    return _affine(image, (1.0, 0.0, x, 0.0, 1.0, y), edges)


def _translate_relative(image: Image.Image, x: float, y: float, edges: Edges) -> Image.Image:
    """`_translate` by fractions of the image's width and height."""
    return _translate(image, x * image.width, y * image.height, edges)


def _affine(image: Image.Image, matrix: tuple[float, ...], edges: Edges) -> Image.Image:
    """Take pixel (x, y) from (a x + b y + c, d x + e y + f); matrix: (a, b, c, d, e, f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=edges.resample, fillcolor=edges.fill
    )


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    return ImageOps.posterize(image, bits if 1 <= bits <= 8 else 1)


def _solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Add to every value below 128."""
    table = [min(value + addition, 255) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(image: Image.Image, enhancer: Enhancer, factor: float) -> Image.Image:
    return enhancer(image).enhance(factor)


def _contrast_from_size(image: Image.Image, factor: float) -> Image.Image:
    """Contrast as in the TensorFlow code: away from grey level H W / 256 (196 at 224 x 224).

    It means the mean grey level, as in Pillow, but sums the histogram without its values.
    """
    grey = min(image.width * image.height // 256, 255)
    return Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, factor)


def _cutout(image: Image.Image, half_side: int, centre: tuple[float, float]) -> Image.Image:
    """A grey square of side 2 half_side around a pixel, cut off at the edge.

    Source: DeVries and Taylor, "Cutout".
    """
    row, column = int(centre[0] * image.height), int(centre[1] * image.width)
    image = image.copy()
    image.paste(AUGREG_EDGES.fill, (column - half_side, row - half_side, column + half_side, row + half_side))
    return image


def color_jitter(image: Image.Image, strength: float, draws: Float64[np.ndarray, " n"]) -> Image.Image:
    """`image` (RGB) with brightness, contrast and saturation scaled, in a random order.

    strength: each factor is uniform in [max(0, 1 - strength), 1 + strength].
    draws: COLOR_JITTER_DRAWS, one for each factor and one for the order.
    Source: torchvision's ColorJitter with hue 0, as timm calls it.
    """
    *factor_draws, order_draw = draws.reshape(COLOR_JITTER_DRAWS).tolist()
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = [low + draw * (high - low) for draw in factor_draws]
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = list(itertools.permutations(zip(enhancers, factors, strict=True)))
    for enhancer, factor in orders[int(order_draw * len(orders))]:
        image = enhancer(image).enhance(factor)
    return image


def random_erasing(
    view: UInt8[Tensor, "3 H W"], probability: float, draws: Float64[np.ndarray, " n"], noise_seed: int
) -> UInt8[Tensor, "3 H W"]:
    """With `probability`, a copy of `view` with a rectangle of noise; otherwise `view` itself.

    draws: RANDOM_ERASING_DRAWS: whether to erase, then (area, aspect, top, left) per attempt.
    noise_seed: in [0, 2^63), the noise's key. Source: Zhong et al., "Random Erasing", as in
    timm's "pixel" mode: normal noise in units normalised by ImageNet's mean and deviation.
    Deviation: the view is uint8, so noise beyond the pixel range (3 to 4% of it) is clipped.
    """
    assert draws.shape == (RANDOM_ERASING_DRAWS,)
    if draws[0] >= probability:
        return view
    top, left, height, width = erasing_box((view.shape[1], view.shape[2]), draws[1:])
    erased = view.clone()
    erased[:, top : top + height, left : left + width] = _pixel_noise(height, width, noise_seed)
    return erased


def erasing_box(size: ImageSize, draws: Float64[np.ndarray, " n"]) -> tuple[int, int, int, int]:
    """The rectangle (top, left, height, width) to erase in an image of that size.

    Its area is uniform in 0.02 to 1/3 of the image, its aspect (height / width) log-uniform in
    0.3 to 1 / 0.3. draws: four for each attempt. If no attempt fits into the image, the
    rectangle is empty.
    """
    rows, columns = sides(size)
    for area_draw, aspect_draw, top_draw, left_draw in draws.reshape(-1, 4).tolist():
        area = rows * columns * (0.02 + area_draw * (1 / 3 - 0.02))
        aspect = math.exp((1 - 2 * aspect_draw) * math.log(0.3))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < rows and width < columns:
            top, left = int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1))
            return top, left, height, width
    return 0, 0, 0, 0


def _pixel_noise(height: int, width: int, noise_seed: int) -> UInt8[Tensor, "3 height width"]:
    # The normal's inverse distribution keeps to Philox's raw words: NumPy may change the stream
    # of Generator.normal.
    normal = scipy.special.ndtri(rng.uniform(3 * height * width, noise_seed, "erase"))
    mean, std = np.reshape(IMAGENET_MEAN, (3, 1, 1)), np.reshape(IMAGENET_STD, (3, 1, 1))
    pixels = 255 * (mean + std * normal.reshape(3, height, width))
    return torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
