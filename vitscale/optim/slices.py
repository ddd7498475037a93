"""What an optimizer must know to work on whole matrices although ZeRO cuts them into slices.

ZeRO flattens the parameters of a group into one buffer, and a rank updates its cut of it. That
changes nothing for AdamW, which treats every value by itself. Adafactor's statistics and Muon's
updates are those of whole matrices, of which a rank may have a few lines, or a part of one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

# Parameters that are several matrices, one below the other: models/layers.py.
_FUSED = {"attn.qkv.weight": 3, "attn_pool.kv.weight": 2}


class Slice(NamedTuple):
    """flat[offset : offset + count] is parameter.flatten()[start : start + count]."""

    name: str
    start: int
    count: int
    offset: int


class Part(NamedTuple):
    """flat[offset : offset + count] has values from `start` on of a matrix of a parameter."""

    name: str
    matrix: int
    start: int
    count: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a flat buffer holds.

    shapes: the whole shape of each parameter of its group, the same on every rank.
    slices: what this rank has of them, in the order of the buffer.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slices: Sequence[Slice]

    def parts(self) -> Iterator[Part]:
        """The slices, cut where a matrix ends.

        For example, 7 values from start = 3 of a qkv.weight [6, 2], which is three matrices
        [2, 2], are the last value of the first, all 4 of the second, and 2 of the third.
        """
        for name, start, count, offset in self.slices:
            _, rows, columns = matrices(name, self.shapes[name])
            size, end = rows * columns, start + count
            for matrix in range(start // size, -(-end // size)):
                low, high = max(start, matrix * size), min(end, (matrix + 1) * size)
                yield Part(name, matrix, low - matrix * size, high - low, offset + low - start)


@runtime_checkable
class Sliced(Protocol):
    """An optimizer that must know what its flat buffers hold before its first step."""

    def place(self, layouts: Mapping[Tensor, Layout]) -> None:
        """Tell it; every rank calls it, with the buffers in the same order."""
        ...


def matrices(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """(number, rows, columns) of the matrices that a parameter consists of.

    q, k and v are maps of their own, although their weights are one parameter. A convolution's
    kernel [O, I, h, w] is a matrix [O, I h w], dimensions of size 1 do not count, and a vector
    is a matrix of one column.
    """
    number = next((number for ending, number in _FUSED.items() if name.endswith(ending)), 1)
    rows, *rest = [size for size in shape if size > 1] or [1]
    return number, rows // number, math.prod(rest)
