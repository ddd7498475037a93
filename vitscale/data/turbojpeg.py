"""libjpeg-turbo 3 through ctypes: decodes only the part of a JPEG that a crop needs.

The library comes with the wheel `turbojpeg`, or is the system's. Version 2 (Debian 12, Ubuntu
22.04) has no tj3 functions and is passed over.
API: https://libjpeg-turbo.org/Documentation/Documentation
"""

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vitscale.data.tar import Bytes

Box = tuple[int, int, int, int]  # top, left, height, width

# Chroma upsampling looks at neighbours: with two more pixels on each side, a crop has the same
# pixels as in the whole image.
MARGIN = 2
_DECOMPRESS = 1  # TJINIT_DECOMPRESS
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLOURSPACE = 0, 4, 5, 6, 7, 8  # TJPARAM_*
_MCU_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # of TJSAMP 444, 422, 420, GRAY, 440, 411, 441
_TO_RGB = (0, 1, 2)  # TJCS RGB, YCbCr, GRAY; the others are CMYK
_RGB = 0  # TJPF_RGB
_END = b"\xff\xd9"


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class TurboJpeg:
    """A decompressor with a new handle for every image, which costs 4 microseconds.

    A handle that stopped in a damaged header would report it for all later images, and lend its
    tables to images that lack theirs.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        # What takes no time keeps the interpreter's lock: to give it away costs more.
        quick = ctypes.PyDLL(library._name)
        quick.tj3Init.restype = pointer
        quick.tj3GetErrorStr.restype = ctypes.c_char_p
        quick.tj3GetErrorStr.argtypes = [pointer]
        quick.tj3Destroy.argtypes = [pointer]
        quick.tj3Set.argtypes = [pointer, integer, integer]
        quick.tj3Get.argtypes = [pointer, integer]
        quick.tj3DecompressHeader.argtypes = [pointer, pointer, size]
        quick.tj3SetCroppingRegion.argtypes = [pointer, _Region]
        library.tj3Decompress8.argtypes = [pointer, pointer, size, pointer, integer, integer]
        self._library, self._quick = library, quick

    def decode(
        self, data: Bytes, choose: Callable[[int, int], Box], check: Callable[[int, int], None]
    ) -> UInt8[np.ndarray, "h w 3"] | None:
        """The pixels of the box that `choose(height, width)` names.

        None for a JPEG that is neither RGB nor grey in 8 bits. check: called with width and
        height before anything is decoded. Raises ValueError at damage. Damage behind the crop
        is not looked at if the JPEG has its end mark: it does not touch the pixels.
        """
        data = bytes(data)  # which ctypes passes as its address
        handle = self._quick.tj3Init(_DECOMPRESS)
        self._quick.tj3Set(handle, _STOP_ON_WARNING, 1)
        try:
            return self._decode(handle, data, choose, check)
        finally:
            self._quick.tj3Destroy(handle)

    def _decode(
        self, handle: int, data: bytes, choose: Callable[[int, int], Box], check: Callable[[int, int], None]
    ) -> UInt8[np.ndarray, "h w 3"] | None:
        get = self._quick.tj3Get
        self._check(self._quick.tj3DecompressHeader(handle, data, len(data)), handle)
        width, height, subsampling = get(handle, _WIDTH), get(handle, _HEIGHT), get(handle, _SUBSAMPLING)
        precision, colourspace = get(handle, _PRECISION), get(handle, _COLOURSPACE)
        check(width, height)
        if colourspace not in _TO_RGB or precision != 8:
            return None
        top, left, box_height, box_width = choose(height, width)
        if (top, left, box_height, box_width) == (0, 0, height, width):
            return self._decompress(handle, data, height, width)
        if data[-2:] != _END:  # it may be cut, which only a decoder of the whole notices
            whole = self._decompress(handle, data, height, width)
            return whole[top : top + box_height, left : left + box_width]
        # A region must begin at a multiple of the MCU's width; it may begin in any row.
        mcu = _MCU_WIDTHS[subsampling] if 0 <= subsampling < len(_MCU_WIDTHS) else width
        x, y = max(0, left - MARGIN) // mcu * mcu, max(0, top - MARGIN)
        right, bottom = min(width, left + box_width + MARGIN), min(height, top + box_height + MARGIN)
        region = _Region(x, y, right - x, bottom - y)
        self._check(self._quick.tj3SetCroppingRegion(handle, region), handle)
        pixels = self._decompress(handle, data, bottom - y, right - x)
        return pixels[top - y : top - y + box_height, left - x : left - x + box_width]

    def _decompress(
        self, handle: int, data: bytes, height: int, width: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of the handle's cropping region, or of the whole image."""
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        start, _ = pixels.__array_interface__["data"]
        self._check(self._library.tj3Decompress8(handle, data, len(data), start, 0, _RGB), handle)
        return pixels

    def _check(self, status: int, handle: int) -> None:
        """Raise ValueError with the library's message if a call failed."""
        if status:
            raise ValueError(self._quick.tj3GetErrorStr(handle).decode("utf-8", "replace"))


@functools.cache
def open_turbojpeg() -> TurboJpeg | None:
    """The decompressor, or None if there is no libjpeg-turbo 3."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(library, "tj3SetCroppingRegion"):
            return TurboJpeg(library)
    return None


def _candidates() -> Iterator[str]:
    """Files that may be libjpeg-turbo 3: the wheel's, then the system's."""
    wheel = importlib.util.find_spec("turbojpeg")
    if wheel and wheel.origin:
        folder = Path(wheel.origin).parent
        yield from sorted(map(str, [*folder.glob("turbojpeg.libs/*turbojpeg*"), *folder.glob(".dylibs/*")]))
    system = ctypes.util.find_library("turbojpeg")
    if system:
        yield system
