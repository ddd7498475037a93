"""Image bytes to RGB pixels. Strict: libjpeg-turbo reports what Pillow passes over, and sizes are checked
before decoding.
"""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

MAX_PIXELS = 50_000_000  # a decompression bomb is refused by its header


class DamagedImage(ValueError):
    """The bytes cannot be decoded to an image; the message says why."""


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG, PNG or WebP to RGB uint8. Raises DamagedImage for damage, other content, or over
    MAX_PIXELS.
    """
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(width), int(height))
            if colorspace in ("YCbCr", "RGB", "Gray"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError as error:
            raise DamagedImage(str(error)) from None
    return _decode_pillow(data)


def _decode_pillow(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """PNG, WebP, and JPEGs in CMYK: what libjpeg-turbo does not turn into RGB."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_size(*image.size)
            return np.asarray(image.convert("RGB"))
    except DamagedImage:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DamagedImage(str(error).split("<")[0].strip() or type(error).__name__) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
