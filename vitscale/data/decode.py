"""Image bytes to RGB pixels, by the fastest decoder there is.

It is strict: libjpeg-turbo reports damage that Pillow passes over, the checksums of a PNG are
compared, and sizes are checked before decoding.
"""

import io
import itertools
import re
from collections.abc import Callable
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from vitscale.data.tar import Bytes
from vitscale.data.turbojpeg import Box, open_turbojpeg
from vitscale.errors import ConfigError

MAX_PIXELS = 50_000_000  # by the header, so that a decompression bomb is refused
# Progressive JPEGs have about 10 scans. Each is a pass over all pixels, of 100 bytes or less.
MAX_SCANS = 100
_SCAN = re.compile(rb"\xff\xda\x00")  # the marker, and the first byte of its length

Decoder = Literal["turbojpeg", "simplejpeg"]
Choose = Callable[[int, int], Box]


class DamagedImage(ValueError):
    """The bytes cannot be decoded to an image, for the reason in the message."""


def resolve_decoder(name: Literal["auto", "turbojpeg", "simplejpeg"]) -> Decoder:
    """The decoder of JPEGs that a run uses. Raises ConfigError if it is not installed."""
    if name == "simplejpeg" or (name == "auto" and not open_turbojpeg()):
        return "simplejpeg"
    if not open_turbojpeg():
        raise ConfigError(
            'data.decoder = "turbojpeg" needs libjpeg-turbo 3, which is not installed; run: '
            'pip install turbojpeg, or set "auto"'
        )
    return "turbojpeg"


def whole(height: int, width: int) -> Box:
    """The box of the whole image."""
    return 0, 0, height, width


def decode(
    data: Bytes, choose: Choose = whole, decoder: Decoder = "simplejpeg"
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode the box of a JPEG, PNG or WebP that `choose(height, width)` names, to RGB.

    `decoder` decodes JPEGs. CMYK JPEGs and the other formats go through Pillow; of 16 bits of
    grey the upper 8 are kept. Raises DamagedImage for damage, for any other content, for
    animations and for more than MAX_PIXELS or MAX_SCANS.
    """
    if data[:3] == b"\xff\xd8\xff":
        if next(itertools.islice(_SCAN.finditer(data), MAX_SCANS, None), None):
            raise DamagedImage(f"a JPEG of more than {MAX_SCANS} scans, which would take too long to decode")
        try:
            pixels = _decode_jpeg(data, choose, decoder)
        except ValueError as error:
            raise DamagedImage(str(error)) from None
        if pixels is not None:
            return pixels
    pixels = _decode_pillow(data)
    return cut(pixels, choose(*pixels.shape[:2]))


def _decode_jpeg(data: Bytes, choose: Choose, decoder: Decoder) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of the box; None for a JPEG that is left to Pillow."""
    if decoder == "turbojpeg":
        turbojpeg = open_turbojpeg()
        assert turbojpeg
        return turbojpeg.decode(data, choose, _check_size)
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    return cut(simplejpeg.decode_jpeg(data, colorspace="RGB"), choose(int(height), int(width)))


def _decode_pillow(data: Bytes) -> UInt8[np.ndarray, "h w 3"]:
    stream = io.BytesIO(data)
    try:
        if data[:4] == b"\x89PNG":  # decoding compares no checksum of the chunks that hold pixels
            Image.open(stream, formats=("PNG",)).verify()
        with Image.open(stream, formats=("JPEG", "PNG", "WEBP")) as image:
            _check_size(*image.size)
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise DamagedImage(f"an animation of {frames} frames; a sample is one still image")
            if image.mode.startswith("I"):  # convert() would clip it to white
                grey = np.asarray(image.convert("I")) >> 8
                return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except (DamagedImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises AssertionError and others for damage, too
        raise DamagedImage(str(error).split("<")[0].strip() or type(error).__name__) from None


def cut(pixels: UInt8[np.ndarray, "H W 3"], box: Box) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a box, as a view of the image's."""
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
