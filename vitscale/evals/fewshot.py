"""Few-shot evaluation: closed-form least squares from frozen features to {-1, 1}^C, in float64.

The protocol of the paper ("regularised least-squares regression mapping the frozen
representation of a subset of training images to {-1, 1}^K"), to the letter of big_vision's
evaluators/fewshot_lsr.py, so that its numbers compare with published ones if the images are
prepared alike (crop = "resize_center"). Nothing is tuned. Only the choice of the training
images is random, and its seeds are part of the protocol.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64

from vitscale import distributed
from vitscale.config import positive
from vitscale.errors import DataError
from vitscale.evals.features import extract, own_indices
from vitscale.evals.probe import ProbeConfig, ProbeTask
from vitscale.evals.task import EvalModel

BIAS_CONSTANT = 100.0  # a constant feature so large that the bias is almost unregularised
L2_REG = 2.0**10
STD_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotConfig(ProbeConfig):
    """Least squares on the frozen features of a few of the training images, with the keys:

    shots:   how many images of each class to train on, each number a result of its own
    seeds:   the draws to average over
    l2_reg:  ridge regularisation; the default is big_vision's
    """

    kind: Literal["fewshot"] = "fewshot"
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    l2_reg: float = L2_REG

    def check(self, where: str) -> None:
        super().check(where)
        self.check_list(where, 1, shots=self.shots)
        self.check_list(where, 0, seeds=self.seeds)
        positive(where, l2_reg=self.l2_reg)


class FewShotTask(ProbeTask[FewShotConfig]):
    """Mean accuracy and its population deviation over the seeds, for each number of shots."""

    def check_sets(self) -> None:
        index = self.train.index
        for shots in self.config.shots:
            check_shots(shots, index.label_counts, index.named)

    @functools.cached_property
    def train_labels(self) -> Int64[np.ndarray, " n"]:
        """The label of each training image, on every rank; every rank calls it.

        Each rank reads its block of the samples: labels are stored in the shards alone.
        """
        own, count = own_indices(np.arange(self.train.num_samples))
        labels = distributed.together(lambda: self.train.labels(own))
        rows = distributed.all_gather_rows(torch.from_numpy(labels[:count]))
        with distributed.alike():
            return self.pool_labels(rows)

    def names(self, model: EvalModel) -> list[str]:
        return [f"{shots}shot{end}" for shots in self.config.shots for end in ("", "_std")]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"1shot": 0.31, "1shot_std": 0.02, ...}, fractions of 1."""
        config, pool = self.config, self.train_labels
        with distributed.alike():
            pairs = itertools.product(config.shots, config.seeds)
            draws = [support_indices(pool, shots, seed, self.train.index.named) for shots, seed in pairs]
        # Only the images of some draw are decoded: the pool may be all of ImageNet.
        drawn = np.unique(np.concatenate(draws))
        support, _ = extract(model, self.train, drawn, config.batch_size)
        everything = np.arange(self.test.num_samples)
        test, padded = extract(model, self.test, everything, config.batch_size)
        with distributed.alike():
            test_labels = self.test_labels(padded, pool)

        # Each rank fits its share of the draws; the sum then holds all, equal on all ranks.
        accuracies = [0.0] * len(draws)
        for i in range(distributed.rank(), len(draws), distributed.world_size()):
            rows = support.numpy()[np.searchsorted(drawn, draws[i])]
            accuracies[i] = least_squares_accuracy(
                rows, pool[draws[i]], test.numpy(), test_labels, config.l2_reg
            )
        by_shots = np.reshape(distributed.all_reduce_sum(accuracies), (len(config.shots), len(config.seeds)))
        results = [float(value) for values in by_shots for value in (values.mean(), values.std())]
        return dict(zip(self.names(model), results, strict=True))


def check_shots(shots: int, counts: Mapping[int, int], named: Callable[[int], str]) -> None:
    """Raise DataError if a class has fewer samples than `shots`. counts: by class."""
    for label, count in sorted(counts.items()):
        if count < shots:
            raise DataError(
                f"{shots}-shot evaluation needs {shots} training examples of every class, but class "
                f"{named(label)} has {count}; lower shots or give more training shards"
            )


def support_indices(
    labels: Int[np.ndarray, " n"], shots: int, seed: int, named: Callable[[int], str] = str
) -> Int64[np.ndarray, " s"]:
    """The positions of `shots` samples of each class, class by class (fewshot_lsr, 215-222).

    One generator serves all classes: each class permutes its samples and keeps the first
    `shots`, so that fewer shots of a seed are a subset of more. Raises DataError if a class
    has too few samples. named: the class in that message (Index.named).
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    check_shots(shots, dict(zip(classes.tolist(), counts.tolist(), strict=True)), named)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return np.concatenate([generator.permutation(indices)[:shots] for indices in by_class])


def least_squares_accuracy(
    support: Float[np.ndarray, "n D"],
    support_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m D"],
    test_labels: Int[np.ndarray, " m"],
    l2_reg: float = L2_REG,
) -> float:
    """The share of `test` whose own class scores highest in the regression fitted on `support`.

    Class ids may be any integers. Raises ValueError unless there is one for each row.
    """
    for labels, features in ((support_labels, support), (test_labels, test)):
        if labels.shape != features.shape[:1]:  # m x 1 labels would be compared with m predictions each
            raise ValueError(
                f"labels of the shape {labels.shape} do not fit {len(features)} rows of features: give one "
                "for each row, in one dimension"
            )
    classes, targets = np.unique(support_labels, return_inverse=True)
    signs = 2.0 * np.eye(len(classes))[targets] - 1.0  # [n, C] in {-1, 1}
    mean, std = whitening(support)
    weights = solve(append_bias((support - mean) / std), signs, l2_reg)  # [D+1, C]
    scores = append_bias((test - mean) / std) @ weights  # [m, C]
    return float(np.mean(classes[scores.argmax(axis=1)] == test_labels))


def whitening(
    support: Float[np.ndarray, "n D"],
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """Mean and deviation (ddof 0, plus 1e-5) of each feature, over the support set alone."""
    features = support.astype(np.float64)
    return features.mean(axis=0), features.std(axis=0) + STD_EPSILON


def append_bias(features: Float64[np.ndarray, "n D"]) -> Float64[np.ndarray, "n D+1"]:
    return np.pad(features, ((0, 0), (0, 1)), constant_values=BIAS_CONSTANT)


def solve(
    x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n C"], l2_reg: float
) -> Float64[np.ndarray, "D C"]:
    """Ridge regression, through the smaller of two eigenproblems (fewshot_lsr, 75-108).

    With l2 = l2_reg, the w that minimises |x w - y|^2 + l2 |w|^2 has two forms:

        w = (x^T x + l2 I)^-1 x^T y         inverts a matrix of D x D
        w = x^T (x x^T + l2 I)^-1 y         inverts a matrix of n x n

    They are equal because (x^T x + l2 I) x^T = x^T (x x^T + l2 I). Eigenvectors turn either
    inverse into a division:

        n >= D:   x^T x = q diag(e) q^T     w = q diag(1 / (e + l2)) q^T x^T y
        n <  D:   x x^T = q diag(e) q^T     w = x^T q diag(1 / (e + l2)) q^T y
    """
    n, dim = x.shape
    return _solve_primal(x, y, l2_reg) if n >= dim else _solve_dual(x, y, l2_reg)


def _solve_primal(x: np.ndarray, y: np.ndarray, l2_reg: float) -> np.ndarray:
    eigenvalues, q = np.linalg.eigh(x.T @ x)  # [D], [D, D]
    return q @ ((q.T @ (x.T @ y)) / (eigenvalues + l2_reg)[:, None])


def _solve_dual(x: np.ndarray, y: np.ndarray, l2_reg: float) -> np.ndarray:
    eigenvalues, q = np.linalg.eigh(x @ x.T)  # [n], [n, n]
    return x.T @ (q @ ((q.T @ y) / (eigenvalues + l2_reg)[:, None]))
