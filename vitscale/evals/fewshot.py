"""Few-shot evaluation: closed-form least squares from frozen features to {-1, 1}^C, in float64 numpy.

The protocol of the paper ("regularised least-squares regression mapping the frozen representation of a subset
of training images to {-1, 1}^K") to the letter of big_vision's evaluators/fewshot_lsr.py, so that numbers
compare with published ones. Nothing is tuned and nothing is drawn but the support set, whose seeds are part
of the protocol.
"""

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from vitscale.config import ConfigError

BIAS_CONSTANT = 100.0  # a constant feature so large that the bias is almost unregularised
L2_REG = 2.0**10
STD_EPSILON = 1e-5


def support_indices(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int64[np.ndarray, " s"]:
    """The positions of `shots` examples of each class, in the order of the classes (fewshot_lsr, 215-222).

    One generator for all classes: each class draws a permutation of its examples and keeps the first `shots`,
    so that fewer shots of the same seed are a subset of more. Raises ConfigError if a class has fewer than
    `shots` examples.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    if (counts < shots).any():
        k = int(np.argmax(counts < shots))
        raise ConfigError(
            f"{shots}-shot evaluation needs {shots} training examples of every class, but class "
            f"{classes[k]} has {counts[k]}; lower shots or give more training shards"
        )
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return np.concatenate([generator.permutation(indices)[:shots] for indices in by_class])


def least_squares_accuracy(
    support: Float[np.ndarray, "n D"],
    support_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m D"],
    test_labels: Int[np.ndarray, " m"],
    l2_reg: float = L2_REG,
) -> float:
    """The share of `test` whose class the regression fitted on `support` ranks first (any class ids)."""
    classes, targets = np.unique(support_labels, return_inverse=True)
    signs = 2.0 * np.eye(len(classes))[targets] - 1.0  # [n, C] in {-1, 1}
    mean, std = whitening(support)
    weights = solve(append_bias((support - mean) / std), signs, l2_reg)
    scores = append_bias((test - mean) / std) @ weights  # [m, C]
    return float(np.mean(classes[scores.argmax(axis=1)] == test_labels))


def whitening(
    support: Float[np.ndarray, "n D"],
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """Mean and standard deviation (ddof 0, plus 1e-5) of each feature over the support set alone."""
    features = support.astype(np.float64)
    return features.mean(axis=0), features.std(axis=0) + STD_EPSILON


def append_bias(features: Float64[np.ndarray, "n D"]) -> Float64[np.ndarray, "n D+1"]:
    return np.pad(features, ((0, 0), (0, 1)), constant_values=BIAS_CONSTANT)


def solve(
    x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n C"], l2_reg: float
) -> Float64[np.ndarray, "D C"]:
    """Ridge regression, argmin |x w - y|^2 + l2_reg |w|^2, by the smaller of the two eigenproblems
    (fewshot_lsr, 75-108).

    n >= D: with x^T x = q diag(e) q^T,  w = q diag(1 / (e + l2)) q^T x^T y n <  D: with x x^T = q diag(e)
    q^T,  w = x^T q diag(1 / (e + l2)) q^T y
    """
    n, dim = x.shape
    return _solve_primal(x, y, l2_reg) if n >= dim else _solve_dual(x, y, l2_reg)


def _solve_primal(x: np.ndarray, y: np.ndarray, l2_reg: float) -> np.ndarray:
    eigenvalues, q = np.linalg.eigh(x.T @ x)  # [D], [D, D]
    return q @ ((q.T @ (x.T @ y)) / (eigenvalues + l2_reg)[:, None])


def _solve_dual(x: np.ndarray, y: np.ndarray, l2_reg: float) -> np.ndarray:
    eigenvalues, q = np.linalg.eigh(x @ x.T)  # [n], [n, n]
    return x.T @ (q @ ((q.T @ y) / (eigenvalues + l2_reg)[:, None]))
