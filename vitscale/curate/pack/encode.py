"""Makes a sample of a reference: its bytes as they are, or re-encoded to a smaller size."""

import re

import numpy as np
import simplejpeg
from PIL import Image

from vitscale.curate.pack.config import SHARD_SPLITS, Omission
from vitscale.curate.pack.listing import Reference
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.samples import RawSample, image_kind

MAX_SIDE = 65_500  # the limit of libjpeg
_PACKED_KEY = re.compile(rf"^({'|'.join(SHARD_SPLITS)})_\d{{8}}_")


def make_sample(reference: Reference, split: str, position: int, short_side: int, quality: int) -> RawSample:
    """The sample at `position` of a split.

    The extension follows the content: ImageNet has PNGs that are named JPEG. Raises Omission
    for what is not an image, and with `short_side` for what cannot be decoded.
    """
    image = reference.read()
    kind = image_kind(image)
    if not kind:
        raise Omission(f"{reference.where}: its content is not a JPEG, PNG or WebP image")
    if short_side:
        try:
            image = shrink(image, short_side, quality)
        except DamagedImage as damage:
            raise Omission(f"{reference.where}: cannot be decoded ({damage})") from None
    key = make_key(split, position, reference.name)
    return RawSample(key, image, image_kind(image), tuple(reference.labels))


def make_key(split: str, position: int, name: str) -> str:
    """A key that is unique by its number, shows the source's name, and fits a plain tar header.

    Example: ("train", 7, "photos/cat 1.jpg") gives train_00000007_cat_1.
    """
    stem = name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]
    stem = _PACKED_KEY.sub("", stem)
    return f"{split}_{position:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"


def shrink(image: bytes, short_side: int, quality: int) -> bytes:
    """Re-encode an image as a JPEG (4:2:0) of that short side; return a smaller one as it is.

    Smaller images are decoded too, so that all damage is found. Raises DamagedImage.

    Pillow's bicubic filter widens with the factor, so it does not alias. It leaves more detail
    for the bilinear crops of training than a bilinear filter, and rings less than Lanczos. EXIF
    orientation is not applied, nor is it in training.
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
