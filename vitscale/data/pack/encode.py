"""A reference to a sample: its bytes as they are, or re-encoded to a smaller size."""

import re

import numpy as np
import simplejpeg
from PIL import Image

from vitscale.data.decode import DamagedImage, decode
from vitscale.data.pack.config import LeftOut
from vitscale.data.pack.listing import Reference
from vitscale.data.samples import RawSample, image_kind

MAX_SIDE = 65_500  # of libjpeg
_PACKED_KEY = re.compile(r"^(train|val|test)_\d{8}_")


def make_sample(reference: Reference, split: str, position: int, short_side: int, quality: int) -> RawSample:
    """The sample at `position` of a split. Raises LeftOut for what is no image or, re-encoded, is damaged.

    The extension follows the content: ImageNet has PNGs that are named JPEG.
    """
    image = reference.read()
    kind = image_kind(image)
    if not kind:
        raise LeftOut(f"{reference.where}: its content is not a JPEG, PNG or WebP image")
    if short_side:
        try:
            image = shrink(image, short_side, quality)
        except DamagedImage as damage:
            raise LeftOut(f"{reference.where}: cannot be decoded ({damage})") from None
    return RawSample(
        make_key(split, position, reference.name), image, image_kind(image), tuple(reference.labels)
    )


def make_key(split: str, position: int, name: str) -> str:
    """A key that is unique by its number, tells the source's name, and fits into a plain tar header."""
    stem = name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]
    stem = _PACKED_KEY.sub("", stem)
    return f"{split}_{position:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"


def shrink(image: bytes, short_side: int, quality: int) -> bytes:
    """The image as a JPEG (4:2:0) whose short side is `short_side`, or as it is where that is not larger.

    Every image is decoded, so that damage is found in all. Raises DamagedImage. Pillow's bicubic filter
    widens with the factor, so it does not alias; it keeps more detail than a bilinear one for the bilinear
    crops of training, and rings less than Lanczos. EXIF orientation is not applied, here nor in training.
    """
    pixels = decode(image)
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return image
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    if max(size) > MAX_SIDE:
        raise DamagedImage(f"{size[0]} x {size[1]} pixels; a JPEG has at most {MAX_SIDE:,} a side")
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(resized, quality=quality, colorspace="RGB", colorsubsampling="420")
