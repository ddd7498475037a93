"""Random crops of an area and an aspect ratio, in the four forms that published recipes have.

Each takes (height, width) of an image, the lowest and highest area as shares of it, the lowest
and highest aspect ratio (width / height), and draws: uniform in [0, 1), four for each attempt.
It returns the crop as (top, left, height, width).

    inception     the area is uniform, and the aspect ratio
    tensorflow    the height is uniform within what area and aspect ratio allow, and the aspect
                  ratio: smaller crops than the area's bounds suggest, on average
    torchvision   the area is uniform, and the logarithm of the aspect ratio
    proportional  the area is uniform, and the aspect ratio is the image's own
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from vitscale.data.turbojpeg import Box

CROP_ATTEMPTS = 10
Bounds = tuple[float, float]


def inception_crop(height: int, width: int, areas: Bounds, aspects: Bounds, draws: np.ndarray) -> Box:
    """Of uniform area and aspect ratio; if no attempt fits the image, all of it.

    Source: "Going deeper with convolutions", section 6.
    """
    for area_draw, aspect_draw, top_draw, left_draw in draws.reshape(-1, 4):
        area = height * width * _between(areas, area_draw)
        box = _of_area(height, width, area, _between(aspects, aspect_draw), top_draw, left_draw)
        if box:
            return box
    return 0, 0, height, width


def torchvision_crop(height: int, width: int, areas: Bounds, aspects: Bounds, draws: np.ndarray) -> Box:
    """As torchvision's and timm's RandomResizedCrop. If no attempt fits, the largest central
    crop whose aspect ratio is within its bounds.
    """
    low, high = aspects
    for area_draw, aspect_draw, top_draw, left_draw in draws.reshape(-1, 4):
        area = height * width * _between(areas, area_draw)
        aspect = math.exp(_between((math.log(low), math.log(high)), aspect_draw))
        box = _of_area(height, width, area, aspect, top_draw, left_draw)
        if box:
            return box
    crop_height, crop_width = height, width
    if width / height < low:
        crop_height = min(height, round(width / low))
    elif width / height > high:
        crop_width = min(width, round(height * high))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def tensorflow_crop(height: int, width: int, areas: Bounds, aspects: Bounds, draws: np.ndarray) -> Box:
    """As TensorFlow's sample_distorted_bounding_box without boxes, with which Google's ViTs and
    BiT were trained. If no attempt fits, the whole image.

    An oddity is kept: a crop never touches the lower or the right edge unless it is as large as
    the image. Deviation: 10 attempts instead of 100.
    """
    smallest, largest = (height * width * share for share in areas)
    for height_draw, aspect_draw, top_draw, left_draw in draws.reshape(-1, 4):
        aspect = _between(aspects, aspect_draw)
        highest = round(math.sqrt(largest / aspect))
        if round(highest * aspect) > width:
            highest = int((width + 0.5 - 1e-7) / aspect)
            highest -= round(highest * aspect) > width
        highest = min(highest, height)
        lowest = min(round(math.sqrt(smallest / aspect)), highest)
        crop_height = lowest + int(height_draw * (highest - lowest + 1))
        # Rounding may leave the bounds of the area by a pixel.
        crop_height += crop_height * round(crop_height * aspect) < smallest
        crop_height -= crop_height * round(crop_height * aspect) > largest
        crop_width = round(crop_height * aspect)
        fits = 0 < crop_width <= width and 0 < crop_height <= height
        if fits and smallest <= crop_height * crop_width <= largest:
            top, left = int(top_draw * (height - crop_height)), int(left_draw * (width - crop_width))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def proportional_crop(height: int, width: int, areas: Bounds, _: Bounds, draws: np.ndarray) -> Box:
    """Of uniform area and the image's own aspect ratio, as BiT crops an image that it has
    squeezed to a square. Where a side would have no pixel, the whole image.
    """
    return inception_crop(height, width, areas, (width / height, width / height), draws)


RANDOM_CROPS: Mapping[str, Callable[[int, int, Bounds, Bounds, np.ndarray], Box]] = {
    "inception": inception_crop,
    "tensorflow": tensorflow_crop,
    "torchvision": torchvision_crop,
    "proportional": proportional_crop,
}


def _of_area(
    height: int, width: int, area: float, aspect: float, top_draw: float, left_draw: float
) -> Box | None:
    """A crop of so many pixels anywhere in the image; None if it does not fit."""
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if not (0 < crop_width <= width and 0 < crop_height <= height):
        return None
    top, left = int(top_draw * (height - crop_height + 1)), int(left_draw * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def _between(bounds: Bounds, draw: float) -> float:
    low, high = bounds
    return low + draw * (high - low)
