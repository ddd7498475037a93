"""Adafactor as "Scaling Vision Transformers" changed it: AdamW's memory, halved.

In place of a second moment of every value, a matrix has one of each row and column. They are a
few numbers, so every rank has all of them: each adds up the squares of the gradients that it
owns, and one all-reduce makes the sums those of whole matrices. The first moment is in bf16.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitscale import distributed
from vitscale.optim.slices import Layout, Part, matrices

# Of big_vision's Adafactor: the fewest rows and columns of a matrix whose second moment is
# factored, how fast the decay of the second moment approaches its limit, and what is added to
# the squares.
MIN_FACTORED, EXPONENT, EPS = 32, 0.8, 1e-30


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235) in the form of arXiv 2106.04560, section 3.4.

    With the gradient G [R, C] of a matrix in step t, of its rows and columns the means:

        beta2 = min(decay_limit, 1 - t^-0.8)
        r     = beta2 r + (1 - beta2) mean over columns of G^2 + 1e-30
        c     = beta2 c + (1 - beta2) mean over rows of G^2 + 1e-30
        m     = momentum m + (1 - momentum) G / sqrt(r c^T / mean(r))
        W     = W - lr (m + weight_decay W)

    Where a matrix has fewer than 32 rows or columns, every value has its own second moment.
    The learning rate is not relative to the weights, updates are not clipped, and m, which is
    kept in bf16, is not corrected for its start at 0: as in big_vision (optax.py). Unlike
    there, the heads of q, k, v and of the projection after them are not matrices of their own,
    and a patch embedding counts as a matrix of all pixels of a patch.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, decay_limit: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay_limit": decay_limit})
        self._layouts: Mapping[Tensor, Layout] = {}
        self._seconds: dict[Tensor, _Seconds] = {}

    def place(self, layouts: Mapping[Tensor, Layout]) -> None:
        """As Sliced.place."""
        self._layouts = layouts
        self._seconds = {flat: _Seconds(layout, flat.device) for flat, layout in layouts.items()}

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The second moment of each parameter, 1-D, the same on every rank; views."""
        return {name: tensor for seconds in self._seconds.values() for name, tensor in seconds.named.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the flat buffers; every rank calls it for those of the same groups."""
        for group in self.param_groups:
            for flat in group["params"]:
                self._update(flat, group)

    def _update(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        gradient, state = flat.grad, self.state[flat]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(flat, dtype=torch.bfloat16)
        state["step"] += 1
        beta2 = min(group["decay_limit"], 1 - float(state["step"]) ** -EXPONENT)
        seconds, parts = self._seconds[flat], list(self._layouts[flat].parts())
        squares = seconds.zeros()
        for part in parts:
            squares.add(part, gradient[part.offset : part.offset + part.count].square())
        distributed.add_up(squares.values)
        seconds.values.lerp_(squares.values.add_(EPS), 1 - beta2)
        for part in parts:
            where = slice(part.offset, part.offset + part.count)
            weight, average = flat[where], state["exp_avg"][where]
            scaled = seconds.scaled(part, gradient[where])
            moment = average.float().lerp_(scaled, 1 - group["momentum"])
            average.copy_(moment)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(moment, alpha=group["lr"])


class _Seconds:
    """The second moments of a flat buffer's parameters, in one tensor.

    For each matrix of a parameter, R values of its rows and C of its columns, or R C values.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        sizes = {name: second_size(name, shape) for name, shape in layout.shapes.items()}
        self.values = torch.zeros(sum(sizes.values()), device=device)
        self.named = dict(zip(sizes, self.values.split(list(sizes.values())), strict=True))

    def zeros(self) -> "_Seconds":
        """The same places, without values."""
        return _Seconds(self._layout, self._device)

    def add(self, part: Part, squares: Tensor) -> None:
        """Add what the squares [count] of a part contribute to the means of whole matrices."""
        (rows, columns), place = self._place(part)
        if not is_factored(rows, columns):
            place[part.start : part.start + part.count] += squares
            return
        lines, first = _lines(squares, part.start, columns)
        place[first : first + len(lines)] += lines.sum(dim=1) / columns
        place[rows:] += lines.sum(dim=0) / rows

    def scaled(self, part: Part, gradient: Tensor) -> Tensor:
        """The gradient [count] of a part over the root of its second moments."""
        (rows, columns), place = self._place(part)
        if not is_factored(rows, columns):
            return gradient * place[part.start : part.start + part.count].rsqrt()
        lines, first = _lines(gradient, part.start, columns)
        of_rows = (place[:rows] / place[:rows].mean()).rsqrt()[first : first + len(lines), None]
        head = part.start - first * columns
        return (lines * of_rows * place[rows:].rsqrt()).view(-1)[head : head + part.count]

    def _place(self, part: Part) -> tuple[tuple[int, int], Tensor]:
        """(rows, columns) of the matrix of a part, and its second moments."""
        number, rows, columns = matrices(part.name, self._layout.shapes[part.name])
        return (rows, columns), self.named[part.name].view(number, -1)[part.matrix]


def is_factored(rows: int, columns: int) -> bool:
    """Whether the second moment of a matrix is one of rows and one of columns."""
    return min(rows, columns) >= MIN_FACTORED


def second_size(name: str, shape: tuple[int, ...]) -> int:
    """How many values the second moment of a parameter has."""
    number, rows, columns = matrices(name, shape)
    return number * (rows + columns if is_factored(rows, columns) else rows * columns)


def _lines(values: Tensor, start: int, columns: int) -> tuple[Tensor, int]:
    """Values of a matrix from `start` on as whole lines [n, columns], and the first line.

    What is missing of the first and the last line is 0.
    """
    head, tail = start % columns, -(start + len(values)) % columns
    padded = F.pad(values, (head, tail)) if head or tail else values  # F.pad always copies
    return padded.view(-1, columns), start // columns
