"""Pixels to model input: crop, resize and flip on the CPU in uint8; normalise on the device.

Every draw is keyed by (seed, epoch, sample, view), so it is the same whoever makes it. Batches
cross to the device as uint8, a quarter of the bytes of float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from vitscale import rng
from vitscale.config import check_choices, positive
from vitscale.data.crops import CROP_ATTEMPTS, RANDOM_CROPS
from vitscale.data.decode import cut
from vitscale.data.distortions import (
    COLOR_JITTER_DRAWS,
    RAND_AUGMENT_DRAWS_PER_OP,
    RANDOM_ERASING_DRAWS,
    color_jitter,
    rand_augment,
    random_erasing,
)
from vitscale.data.turbojpeg import Box
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, sides

MAX_ASPECT = 100  # of an image that is resized as a whole, for crop = "center"
Crop = Literal["resize", "resize_center", "center"]  # of an evaluation
PAD_FILLS = {"black": 0, "grey": 128}  # normalize() makes it -1 and 0.004


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training augmentation ([augment]). Every crop is resized to model.image_size.

    crop:            "inception", "tensorflow" and "torchvision" take a random area and aspect
                     ratio, each in its own way (crops.py); "proportional" takes a random area
                     in the image's own aspect ratio; "pad" resizes, pads and crops at random
                     (the CIFAR recipe); "resize" takes the whole image.
    crop_area:       of the first four, as a share of the image: lowest, highest.
    crop_aspect:     of the first three, width / height before the crop is resized.
    pad:             pixels added on each side, for "pad".
    pad_fill:        their colour: "black", or "grey" (128), which the model sees as 0.
    flip:            mirror half of the images.
    randaugment:     "augreg" as in "How to train your ViT", or "deit" as in DeiT, where the
                     magnitude varies (distortions.py); "none" = off.
    randaugment_*:   the number of ops, their magnitude (from 0; 10 is usual), its deviation.
    color_jitter:    strength for brightness, contrast and saturation; 0 = off.
    random_erasing:  probability.
    mixup, cutmix:   alpha of the Beta distribution; 0 = off.
    cutmix_share:    the share of pairs that are cut where both are on (objectives/mixup.py).
    repeats:         views of each sample in a global batch (repeated augmentation, Hoffer et
                     al. 2020); an epoch then has `repeats` times as many images.
    """

    crop: Literal["inception", "tensorflow", "torchvision", "proportional", "pad", "resize"] = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    pad: int = 4
    pad_fill: Literal["black", "grey"] = "black"
    flip: bool = True
    randaugment: Literal["none", "augreg", "deit"] = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: float = 10.0
    randaugment_magnitude_std: float = 0.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_share: float = 0.5
    repeats: int = 1

    def __post_init__(self) -> None:
        check_choices(self)
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.crop_area {[low, high]} must rise within (0, 1], like [0.05, 1.0]")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ConfigError(
                f"augment.crop_aspect {list(self.crop_aspect)} must rise from above 0, like [0.75, 1.33]"
            )
        positive("augment", repeats=self.repeats, randaugment_ops=self.randaugment_ops)
        for name in ("pad", "randaugment_magnitude", "randaugment_magnitude_std", "color_jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augment.{name} {getattr(self, name)} must not be negative")
        if self.randaugment == "augreg" and self.randaugment_magnitude_std:
            raise ConfigError(
                'augment.randaugment = "augreg" has no deviation of its magnitude; '
                'set randaugment_magnitude_std = 0, or use "deit"'
            )
        if self.mixup < 0 or self.cutmix < 0:
            raise ConfigError(
                f"augment.mixup {self.mixup} and augment.cutmix {self.cutmix} must not be negative"
            )
        for name in ("random_erasing", "cutmix_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} {getattr(self, name)} must lie in [0, 1]")


class ViewKey(NamedTuple):
    """Whose random draws they are: a sample's in an epoch, for one of its `repeats` views.

    sample: numbered through all sources. epoch: of its source.
    """

    seed: int
    epoch: int
    sample: int
    view: int = 0

    def uniform(self, n: int, domain: str) -> Float64[np.ndarray, " n"]:
        return rng.uniform(n, self.seed, domain, self.epoch, self.sample, self.view)


def choose_box(config: AugmentConfig, key: ViewKey, height: int, width: int) -> Box:
    """The part of an image that a view is made of, known before the image is decoded."""
    random_crop = RANDOM_CROPS.get(config.crop)
    if random_crop is None:
        return 0, 0, height, width
    draws = key.uniform(4 * CROP_ATTEMPTS, "crop")
    return random_crop(height, width, config.crop_area, config.crop_aspect, draws)


def finish_views(
    boxes: Sequence[UInt8[np.ndarray, "H W 3"]], config: AugmentConfig, keys: Sequence[ViewKey]
) -> UInt8[Tensor, "n 3 H W"]:
    """Training views of the n boxes that choose_box took, resized: shifted, flipped, distorted.

    A view is the same whatever others are made with it; many at once take less time. A shift by
    (1, -1) and a flip, of 4 x 4 pixels, where . is config.pad_fill:

        a b c d      . e f g      g f e .
        e f g h      . i j k      k j i .
        i j k l      . m n o      o n m .
        m n o p      . . . .      . . . .
    """
    (height, width), pad = boxes[0].shape[:2], config.pad if config.crop == "pad" else 0
    ids = np.array([(key.epoch, key.sample, key.view) for key in keys])  # [n, 3]
    shift_draws, flip_draws = rng.uniform_rows(2, keys[0].seed, ("crop", "flip"), ids)  # [n, 2] each
    shifts = ((2 * pad + 1) * shift_draws).astype(np.int64) - pad if pad else np.zeros_like(ids[:, :2])
    flips = (flip_draws[:, 0] < 0.5) & config.flip  # [n]
    # Of the part of a box that its shifted window sees, in the window: [n, 2] for y and x.
    starts = np.maximum(0, -shifts)
    stops = np.maximum(starts, np.minimum((height, width), (height, width) - shifts))
    edges = np.concatenate([starts, stops, starts + shifts, stops + shifts], axis=1)
    views = np.full((len(boxes), 3, height, width), PAD_FILLS[config.pad_fill], dtype=np.uint8)
    for view, box, flip, edge in zip(views, boxes, flips.tolist(), edges.tolist(), strict=True):
        top, left, bottom, right, source_top, source_left, source_bottom, source_right = edge
        part = box[source_top:source_bottom, source_left:source_right]
        if flip:
            part, left, right = part[:, ::-1], width - right, width - left
        view[:, top:bottom, left:right] = part.transpose(2, 0, 1)
    finished = torch.from_numpy(views)
    if config.randaugment != "none" or config.color_jitter or config.random_erasing:
        for number, key in enumerate(keys):
            finished[number] = _distort(finished[number], config, key)
    return finished


def _distort(view: UInt8[Tensor, "3 H W"], config: AugmentConfig, key: ViewKey) -> UInt8[Tensor, "3 H W"]:
    if config.randaugment != "none" or config.color_jitter:
        image = Image.fromarray(view.permute(1, 2, 0).numpy())  # [H, W, 3]
        view = torch.from_numpy(np.array(_distort_image(image, config, key))).permute(2, 0, 1)
    if config.random_erasing:
        view = random_erasing(
            view,
            config.random_erasing,
            key.uniform(RANDOM_ERASING_DRAWS, "erase"),
            rng.derive_seed(key.seed, "erase", key.epoch, key.sample, key.view),
        )
    return view


def _distort_image(image: Image.Image, config: AugmentConfig, key: ViewKey) -> Image.Image:
    if config.color_jitter:
        image = color_jitter(image, config.color_jitter, key.uniform(COLOR_JITTER_DRAWS, "jitter"))
    if config.randaugment != "none":
        num_draws = RAND_AUGMENT_DRAWS_PER_OP * config.randaugment_ops
        image = rand_augment(
            image,
            config.randaugment,
            config.randaugment_ops,
            config.randaugment_magnitude,
            config.randaugment_magnitude_std,
            key.uniform(num_draws, "randaugment"),
        )
    return image


def evaluation_view(
    pixels: UInt8[np.ndarray, "h w 3"], crop: Crop, size: ImageSize
) -> UInt8[Tensor, "3 H W"]:
    """The evaluation view of a decoded image.

    "resize" squeezes it to the size. "resize_center" squeezes it to size x 256 / 224, and takes
    the centre. "center" keeps its aspect ratio: it makes the image as small as covers
    size x 256 / 224, and takes the centre. For a square, the short side then has
    size x 256 / 224 pixels. Of an image longer than MAX_ASPECT times its short side, it resizes
    the middle alone: the rest would take gigabytes and is not in the view.
    """
    rows, columns = sides(size)
    if crop == "resize":
        return resize(pixels, rows, columns).contiguous()
    height, width = rows * 256 / 224, columns * 256 / 224
    if crop == "center":
        pixels = _middle(pixels, MAX_ASPECT * min(pixels.shape[:2]))
        scale = max(height / pixels.shape[0], width / pixels.shape[1])
        height, width = pixels.shape[0] * scale, pixels.shape[1] * scale
    elif crop != "resize_center":
        assert_never(crop)
    resized = resize(pixels, max(rows, round(height)), max(columns, round(width)))
    top, left = (resized.shape[1] - rows) // 2, (resized.shape[2] - columns) // 2
    return resized[:, top : top + rows, left : left + columns].contiguous()


def _middle(pixels: UInt8[np.ndarray, "h w 3"], longest: int) -> UInt8[np.ndarray, "H W 3"]:
    """The middle of an image, with no side above `longest`."""
    height, width = (min(longest, side) for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return cut(pixels, (top, left, height, width))


def resize(pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[Tensor, "3 H W"]:
    """Antialiased bilinear resize in uint8."""
    # A crop or a read-only array is copied. Channels-last memory is torch's fast path.
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]  # [1 3 h w]
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return image[0]


def resize_box(pixels: UInt8[np.ndarray, "h w 3"], size: ImageSize) -> UInt8[np.ndarray, "H W 3"]:
    """`resize` as an array with channels last; pixels of that size are not copied."""
    if pixels.shape[:2] == sides(size):
        return pixels
    return resize(pixels, *sides(size)).permute(1, 2, 0).numpy()


def normalize(images: UInt8[Tensor, "B 3 H W"], dtype: torch.dtype) -> Float[Tensor, "B 3 H W"]:
    """Pixels to [-1, 1] on their device: (x - 127.5) / 127.5, as in the paper's code."""
    return (images - 127.5).div_(127.5).to(dtype)
