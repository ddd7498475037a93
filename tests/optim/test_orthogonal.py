"""Muon's iteration brings the singular values of a matrix near 1 and keeps its directions.

And what it and Adafactor cost in operations, each of which is a kernel on a GPU.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale.optim.adafactor import Adafactor
from vitscale.optim.muon import ITERATIONS, orthogonal
from vitscale.optim.slices import Layout, Slice


class Counted(TorchDispatchMode):
    """Counts the operations of a block by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_1_and_directions_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    within = left.T @ orthogonal(matrix.to(dtype)).float() @ right.T
    after = within.diagonal()
    kept = values > 0.02 * values.max()  # those that are nearly 0 stay small
    assert kept.sum() >= 20 and after[kept].min() > 0.6 and after[kept].max() < 1.3
    off_diagonal = within - torch.diag(after)
    assert off_diagonal.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_the_size_of_a_matrix_does_not_count_and_zeros_stay_zeros() -> None:
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(1e-3 * matrix), orthogonal(1e3 * matrix), rtol=1e-3, atol=1e-3)
    assert not orthogonal(torch.zeros(4, 6)).any()


def test_an_iteration_is_three_matmuls_and_nothing_else() -> None:
    with Counted() as counted:
        orthogonal(torch.ones(8, 16))
    assert (counted.names["mm"], counted.names["addmm"]) == (ITERATIONS, 2 * ITERATIONS)
    assert counted.names["mul"] + counted.names["add"] == 1  # for the norm that it begins with


@pytest.mark.parametrize(("start", "pads"), [(0, 0), (3, 2)])
def test_adafactor_copies_a_part_only_to_fill_up_lines(start: int, pads: int) -> None:
    """Of its squares and of its gradient, as the part begins within a line."""
    flat = torch.ones(40 * 50 - start, requires_grad=True)
    flat.grad = torch.ones_like(flat)
    optimizer = Adafactor([{"params": [flat], "weight_decay": 0.1}], lr=0.1, momentum=0.9, decay_limit=0.99)
    optimizer.place({flat: Layout({"fc.weight": (40, 50)}, [Slice("fc.weight", start, len(flat), 0)])})
    with Counted() as counted:
        optimizer.step()
    assert counted.names["constant_pad_nd"] == pads
