"""Pixels to model input: crop, flip and resize on the CPU in uint8; normalisation on the device.

Every draw is keyed by (seed, epoch, sample), so it is the same whoever makes it. Batches cross to the device
as uint8, a quarter of float32's bytes.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale import rng
from vitscale.config import ConfigError

CROP_ATTEMPTS = 10
Pixels = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training augmentation ([augment]).

    crop: "inception" takes a random area and aspect ratio; "pad" resizes, pads by `pad` black pixels and
    crops at random (the CIFAR recipe); "resize" takes the whole image. All end at model.image_size.
    """

    crop: Literal["inception", "pad", "resize"] = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.crop_area {[low, high]} must rise within (0, 1], like [0.05, 1.0]")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ConfigError(
                f"augment.crop_aspect {list(self.crop_aspect)} must rise from above 0, like [0.75, 1.33]"
            )
        if self.pad < 0:
            raise ConfigError(f"augment.pad {self.pad} must not be negative")


def augment(
    pixels: UInt8[np.ndarray, "h w 3"],
    config: AugmentConfig,
    size: int,
    seed: int,
    epoch: int,
    sample_id: int,
) -> UInt8[Tensor, "3 size size"]:
    """The training view of a sample in an epoch."""
    if config.crop == "inception":
        draws = rng.uniform(4 * CROP_ATTEMPTS, seed, "crop", epoch, sample_id)
        top, left, height, width = inception_crop(pixels.shape[0], pixels.shape[1], config, draws)
        view = resize(pixels[top : top + height, left : left + width], size, size)
    else:
        view = resize(pixels, size, size)
    if config.crop == "pad" and config.pad:
        draws = rng.uniform(2, seed, "crop", epoch, sample_id)
        top, left = (int(draw * (2 * config.pad + 1)) for draw in draws)
        view = F.pad(view, [config.pad] * 4)[:, top : top + size, left : left + size]
    if config.flip and rng.uniform(1, seed, "flip", epoch, sample_id)[0] < 0.5:
        view = view.flip(-1)
    return view.contiguous()


def inception_crop(
    height: int, width: int, config: AugmentConfig, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width) after "Going deeper with convolutions": area and aspect ratio
    uniform.

    draws: uniform numbers in [0, 1), four for each attempt; when no attempt fits the image, the whole image
    is taken. Source: TensorFlow's sample_distorted_bounding_box, which differs in that it draws the height,
    not the area, uniformly.
    """
    for area_draw, aspect_draw, top_draw, left_draw in draws.reshape(-1, 4):
        area = (
            height * width * (config.crop_area[0] + area_draw * (config.crop_area[1] - config.crop_area[0]))
        )
        aspect = config.crop_aspect[0] + aspect_draw * (config.crop_aspect[1] - config.crop_aspect[0])
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def evaluation_view(
    pixels: UInt8[np.ndarray, "h w 3"], crop: Literal["resize", "center"], size: int
) -> UInt8[Tensor, "3 size size"]:
    """The evaluation view: squeezed to the square ("resize"), or short side to size * 256 / 224 and centre
    crop.
    """
    if crop == "resize":
        return resize(pixels, size, size).contiguous()
    height, width = pixels.shape[:2]
    scale = size * 256 / 224 / min(height, width)
    resized = resize(pixels, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized.shape[1] - size) // 2, (resized.shape[2] - size) // 2
    return resized[:, top : top + size, left : left + size].contiguous()


def resize(pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[Tensor, "3 H W"]:
    """Antialiased bilinear resize in uint8."""
    # A crop or a read-only array is copied; [1, 3, h, w] in channels-last memory is torch's fast path.
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return image[0]


def normalize(images: UInt8[Tensor, "B 3 H W"], dtype: torch.dtype) -> Float[Tensor, "B 3 H W"]:
    """Pixels to [-1, 1] on the tensor's device: (x - 127.5) / 127.5, as the paper's code scales its input."""
    return ((images.float() - 127.5) / 127.5).to(dtype)
