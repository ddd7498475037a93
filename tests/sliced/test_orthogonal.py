"""Muon's iteration brings the singular values of a matrix near 1 and keeps its directions."""

import pytest
import torch

from vitscale.sliced.muon import orthogonal


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
