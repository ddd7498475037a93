"""The OpenCV operations by which TFDS made two of the data sets, in integer arithmetic.

Each gives the bytes of OpenCV 4.10 and 5.0 for x86: resize (INTER_LINEAR), GaussianBlur and
circle. So does Pillow for JPEGs, as both call libjpeg-turbo. Two things differ: 16-bit images
become 8-bit here, and a JPEG that is cut is refused where OpenCV decodes what is there.
"""

import io

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from PIL import Image, ImageOps

from vitscale.errors import DataError

_RESIZE_BITS = 11  # INTER_RESIZE_COEF_BITS
_BLUR_BITS = 8  # of a weight of the blur, as ufixedpoint16


def decode_rgb(image: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels with the EXIF orientation applied, as imdecode does; JPEG, PNG, BMP or GIF.

    Raises DataError for anything else, and for what is cut.
    """
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "BMP", "GIF")) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"its content cannot be decoded ({error})") from None


def encode_jpeg(pixels: UInt8[np.ndarray, "H W *C"], quality: int) -> bytes:
    """A JPEG with 4:2:0 subsampling, the default of OpenCV and TensorFlow too."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resize(pixels: UInt8[np.ndarray, "H W 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """cv2.resize(pixels, None, fx=factor, fy=factor): bilinear, without antialiasing.

    The weights have 11 bits, and the fraction of a row is not zeroed at the border as that of a
    column is: this decides the rounding of the last row.
    """
    height, width = pixels.shape[:2]
    top, below = _positions(height, factor)
    left, right = _positions(width, factor)
    if (len(top), len(left)) == (height, width):
        return pixels
    right[(left < 0) | (left >= width - 1)] = 0
    left, top = left.astype(np.int64), top.astype(np.int64)
    columns = [np.clip(left + step, 0, width - 1) for step in (0, 1)]
    rows = [np.clip(top + step, 0, height - 1) for step in (0, 1)]
    (first, second), weights = _weights(right), _weights(below)
    total = np.full((len(top), len(left), 3), 2, np.int32)
    for at, weight in zip(rows, weights, strict=True):
        source = pixels[at].astype(np.int32)  # [h W 3]
        across = source[:, columns[0]] * first[:, None] + source[:, columns[1]] * second[:, None]
        total += (across >> 4) * weight[:, None, None] >> 16  # [h w 3]
    return (total >> 2).clip(0, 255).astype(np.uint8)


def blur(pixels: UInt8[np.ndarray, "H W 3"], sigma: float) -> Int64[np.ndarray, "H W 3"]:
    """cv2.GaussianBlur(pixels, (0, 0), sigma), of values from 0 to 255.

    As products of matrices. They are exact in float32: all sums are integers below 2^24.
    """
    height, width = pixels.shape[:2]
    kernel = _gaussian(sigma)
    across = pixels.transpose(2, 0, 1).astype(np.float32) @ _blur_matrix(width, kernel).T  # [3 H W]
    blurred = (_blur_matrix(height, kernel) @ across).transpose(1, 2, 0).astype(np.int64)
    return blurred + (1 << 2 * _BLUR_BITS - 1) >> 2 * _BLUR_BITS


def disc(height: int, width: int, radius: int) -> Bool[np.ndarray, "H W"]:
    """cv2.circle(mask, (width // 2, height // 2), radius, thickness=-1): a filled circle.

    Its border is that of the midpoint algorithm, not of x^2 + y^2 <= r^2.
    """
    mask = np.zeros((height, width), bool)
    middle_y, middle_x = height // 2, width // 2
    error, dx, dy = 0, radius, 0
    while dx >= dy:
        for y, half in ((dy, dx), (dx, dy)):
            for row in (middle_y - y, middle_y + y):
                if 0 <= row < height:
                    mask[row, max(middle_x - half, 0) : middle_x + half + 1] = True
        error += 2 * dy + 1
        dy += 1
        if error > 0:
            error -= 2 * dx - 1
            dx -= 1
    return mask


def _positions(size: int, factor: float) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """The centres of the new pixels on an axis: the pixel before, and the fraction."""
    count = round(size * factor)
    centres = ((np.arange(count) + 0.5) * (1 / factor) - 0.5).astype(np.float32)
    before = np.floor(centres)
    return before, centres - before


def _weights(
    fraction: Float32[np.ndarray, " n"],
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """The weights of the pixels before and after, of _RESIZE_BITS."""
    one = np.float32(1 << _RESIZE_BITS)
    before, after = np.rint((1 - fraction) * one), np.rint(fraction * one)
    return before.astype(np.int32), after.astype(np.int32)


def _blur_matrix(size: int, kernel: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "n n"]:
    """Row i has the weights of pixel i; the image goes on as its mirror image (reflect-101)."""
    matrix = np.zeros((size, size), np.float32)
    places = np.arange(size)
    for shift, weight in enumerate(kernel, -(len(kernel) // 2)):
        mirrored = np.abs(places + shift) % max(2 * size - 2, 1)
        np.add.at(matrix, (places, np.minimum(mirrored, 2 * size - 2 - mirrored)), np.float32(weight))
    return matrix


def _gaussian(sigma: float) -> Int64[np.ndarray, " k"]:
    """The kernel in units of 2^-8; the error of each rounding is carried to the next weight."""
    half = round(sigma * 6 + 1) // 2
    exact = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    exact *= (1 << _BLUR_BITS) / exact.sum()
    kernel, carried = np.zeros(2 * half + 1, np.int64), 0.0
    for place in range(half):
        weight = exact[place] + carried
        kernel[place] = kernel[-1 - place] = round(weight)
        carried = weight - kernel[place]
    kernel[half] = (1 << _BLUR_BITS) - kernel.sum()
    return kernel
