"""Pixels as pictures that are part of the page, and galleries of them."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vitscale.report.page.html import Html, element, joined

LONGEST_SIDE = 160  # pixels; larger images are made smaller
LOSSLESS_SIDE = 64  # up to so many, PNG shows every pixel as it is
JPEG_QUALITY = 85


def picture(pixels: UInt8[np.ndarray, "h w 3"], alt: str, *, lossless: bool = False) -> Html:
    """An image of the page, with the pixels in it. lossless: in its own size, as it is."""
    image = Image.fromarray(pixels)
    if not lossless:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    is_small = max(image.size) <= LOSSLESS_SIDE
    buffer = io.BytesIO()
    if is_small or lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/{'png' if is_small or lossless else 'jpeg'};base64,{content}"
    return element(
        "img", src=source, alt=alt, width=image.width, height=image.height, class_="small" * is_small
    )


def channels_last(image: UInt8[Tensor, "3 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a model input as those of a picture."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def card(shown: Html, *lines: str, class_: str = "") -> Html:
    """A picture, or a text in its place, with lines of text below it."""
    return element("figure", shown, joined(element("div", line) for line in lines), class_=class_)


def gallery(cards: Sequence[Html], class_: str = "") -> Html:
    return element("div", *cards, class_=f"gallery {class_}".strip())
