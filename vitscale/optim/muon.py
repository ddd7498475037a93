"""Muon: the momentum of a matrix, made orthogonal, is its update.

ZeRO cuts a group into consecutive slices, so most matrices lie within one rank, which makes
their updates alone. Those at the border of slices are gathered; the rank that has most of one
makes its update, and all get it. So each matrix is made orthogonal once, and the work is shared
as the values are.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitscale import distributed
from vitscale.optim.slices import Layout, Part, matrices

# What parameter_groups calls the groups that are updated so; the others are AdamW's.
MATRICES = "matrices"
ITERATIONS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
SCALE = 0.2


class Border(NamedTuple):
    """A matrix of which several ranks have a part.

    owner: the rank that makes its update. offset: where it begins in the buffer of all of them.
    """

    owner: int
    offset: int


class Muon(torch.optim.AdamW):
    """Muon on the matrices of the blocks, AdamW on everything else.

    With the gradient G [R, C] of a matrix, in the form of "Muon is Scalable for LLM Training"
    (arXiv 2502.16982, equation 4):

        m = momentum m + (1 - momentum) G
        O = orthogonal((1 - momentum) G + momentum m)           (Nesterov)
        W = W - lr (0.2 sqrt(max(R, C)) O + weight_decay W)

    The factor gives an update the root mean square of AdamW's, so its learning rate and its
    weight decay stay. q, k and v are made orthogonal apart: together, the larger gradients of
    one would decide what becomes of the others.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        """dtype: in which matrices are made orthogonal: fp32, or bf16 for speed."""
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._momentum, self._dtype = momentum, dtype
        self._layouts: Mapping[Tensor, Layout] = {}
        self._borders: dict[Tensor, dict[tuple[str, int], Border]] = {}

    def place(self, layouts: Mapping[Tensor, Layout]) -> None:
        """As Sliced.place."""
        self._layouts = layouts
        mine = [
            [[part.name, part.matrix, part.count] for part in layout.parts() if not _is_whole(part, layout)]
            for layout in layouts.values()
        ]
        of_ranks = distributed.gather_json(mine)
        for index, (flat, layout) in enumerate(layouts.items()):
            counts: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0] * len(of_ranks))
            for rank, of_flats in enumerate(of_ranks):
                for name, matrix, count in of_flats[index]:
                    counts[name, matrix][rank] = count
            borders, end = {}, 0
            for (name, matrix), count in sorted(counts.items()):
                borders[name, matrix] = Border(count.index(max(count)), end)
                end += _size(name, layout)
            self._borders[flat] = borders

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the flat buffers; every rank calls it for those of the same groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["name"] != MATRICES]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["name"] == MATRICES:
                for flat in group["params"]:
                    self._update(flat, group)

    def _update(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        gradient, state = flat.grad, self.state[flat]
        assert gradient is not None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg"].lerp_(gradient, 1 - self._momentum)
        momentum = gradient.lerp(state["exp_avg"], self._momentum)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        layout, borders = self._layouts[flat], self._borders[flat]
        shared = self._border_updates(momentum, layout, borders)
        for part in layout.parts():
            border = borders.get((part.name, part.matrix))
            where = slice(part.offset, part.offset + part.count)
            if border:
                update = shared[border.offset + part.start : border.offset + part.start + part.count]
            else:
                update = self._orthogonal(momentum[where], part.name, layout)
            _, rows, columns = matrices(part.name, layout.shapes[part.name])
            flat[where].sub_(update, alpha=group["lr"] * SCALE * max(rows, columns) ** 0.5)

    def _border_updates(
        self, momentum: Tensor, layout: Layout, borders: Mapping[tuple[str, int], Border]
    ) -> Tensor:
        """The updates of the matrices that several ranks have parts of, one after the other.

        Every rank gets all of them, and so needs memory for each, in the dtype of the matmuls.
        """
        size = sum(_size(name, layout) for name, _ in borders)
        gathered = torch.zeros(size, dtype=self._dtype, device=momentum.device)
        if not borders:
            return gathered
        for part in layout.parts():
            if border := borders.get((part.name, part.matrix)):
                start = border.offset + part.start
                gathered[start : start + part.count] = momentum[part.offset : part.offset + part.count]
        distributed.add_up(gathered)
        updates = torch.zeros_like(gathered)
        for (name, _), border in borders.items():
            if border.owner == distributed.rank():
                where = slice(border.offset, border.offset + _size(name, layout))
                updates[where] = self._orthogonal(gathered[where], name, layout)
        distributed.add_up(updates)
        return updates

    def _orthogonal(self, values: Tensor, name: str, layout: Layout) -> Tensor:
        _, rows, columns = matrices(name, layout.shapes[name])
        return orthogonal(values.view(rows, columns).to(self._dtype)).reshape(-1)


def orthogonal(matrix: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """About U V^T of the matrix U S V^T: five iterations of Newton and Schulz.

    They bring each singular value to between 0.7 and 1.2, unless it is nearly 0 beside the
    largest. The coefficients are Keller Jordan's (kellerjordan.github.io/posts/muon).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.vector_norm(x, dtype=torch.float32) + EPS).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _size(name: str, layout: Layout) -> int:
    """The values of one matrix of a parameter."""
    _, rows, columns = matrices(name, layout.shapes[name])
    return rows * columns


def _is_whole(part: Part, layout: Layout) -> bool:
    return part.count == _size(part.name, layout)
