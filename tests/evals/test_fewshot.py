"""The few-shot protocol: exact algebra, and what must leave its predictions unchanged."""

import numpy as np
import pytest

from vitscale.errors import DataError
from vitscale.evals import fewshot
from vitscale.evals.fewshot import append_bias, least_squares_accuracy, support_indices, whitening


def blobs(n: int, dim: int, classes: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clouds around fixed class centres, every class equally often."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    labels = np.arange(n) % classes
    return centres[labels] + spread * np.random.default_rng(seed).normal(size=(n, dim)), labels


def test_support_is_the_first_shots_of_one_permutation_per_class_from_one_generator():
    labels = np.array([2, 0, 2, 0, 2, 0, 0, 2])
    generator = np.random.default_rng(7)
    expected = [*generator.permutation([1, 3, 5, 6])[:2], *generator.permutation([0, 2, 4, 7])[:2]]
    assert support_indices(labels, shots=2, seed=7).tolist() == expected


def test_fewer_shots_of_a_seed_are_a_subset_of_more():
    labels = np.arange(60) % 3
    few, many = support_indices(labels, 2, seed=1), support_indices(labels, 9, seed=1)
    assert set(few) < set(many)
    assert np.bincount(labels[many]).tolist() == [9, 9, 9]
    assert set(many) != set(support_indices(labels, 9, seed=2))


def test_a_class_with_too_few_examples_is_named():
    with pytest.raises(DataError, match="class 4 has 2"):
        support_indices(np.array([1, 1, 1, 4, 4]), shots=3, seed=0)


@pytest.mark.parametrize(("n", "dim"), [(40, 12), (12, 12), (9, 30)])
def test_both_eigen_branches_solve_the_ridge_system(n: int, dim: int):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(n, dim)), generator.normal(size=(n, 4))
    expected = np.linalg.solve(x.T @ x + 3.0 * np.eye(dim), x.T @ y)
    for solver in (fewshot.solve, fewshot._solve_primal, fewshot._solve_dual):
        np.testing.assert_allclose(solver(x, y, 3.0), expected, atol=1e-8, rtol=0)


def test_both_branches_agree_on_whitened_features_with_the_large_bias():
    features, labels = blobs(50, 64, 5, seed=1)
    mean, std = whitening(features)
    x, y = append_bias((features - mean) / std), 2.0 * np.eye(5)[labels] - 1.0
    difference = fewshot._solve_primal(x, y, 1024.0) - fewshot._solve_dual(x, y, 1024.0)
    assert abs(difference).max() < 1e-8


def test_whitening_leaves_zero_mean_and_unit_deviation_in_float64():
    features, _ = blobs(30, 6, 3, seed=2)
    mean, std = whitening(features.astype(np.float32))
    assert mean.dtype == np.float64
    np.testing.assert_allclose(std, features.std(axis=0) + 1e-5, rtol=1e-6)
    assert append_bias((features - mean) / std)[:, -1].tolist() == [100.0] * 30


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("misfit", ["support", "test"])
def test_labels_of_another_shape_than_one_for_each_row_are_refused(misfit: str):
    train, labels = blobs(30, 10, 3, seed=3, spread=0.1)
    wrong = [labels[:, None], labels[:-1], labels[:1]]
    assert least_squares_accuracy(train, labels, train, labels) == 1.0
    for other in wrong:
        pair = (other, labels) if misfit == "support" else (labels, other)
        with pytest.raises(ValueError, match=r"labels of the shape \(.*\) do not fit 30 rows of features"):
            least_squares_accuracy(train, pair[0], train, pair[1])


def predictions(train: np.ndarray, labels: np.ndarray, test: np.ndarray, l2_reg: float = 1024.0) -> list[int]:
    """The predicted class of each test row, read off the accuracy of that row alone."""
    classes = np.unique(labels)
    hits = [
        [least_squares_accuracy(train, labels, row[None], np.array([k]), l2_reg) for k in classes]
        for row in test
    ]
    return [int(classes[int(np.argmax(row))]) for row in hits]


def test_scaling_or_permuting_features_leaves_predictions_unchanged():
    train, labels = blobs(30, 10, 3, seed=3, spread=2.0)
    test, _ = blobs(20, 10, 3, seed=4, spread=2.0)
    base = predictions(train, labels, test)
    scale = 10.0 ** np.random.default_rng(5).uniform(-1, 2, size=10)
    order = np.random.default_rng(6).permutation(10)
    assert len(set(base)) == 3
    assert predictions(train * 37.0, labels, test * 37.0) == base
    assert predictions(train * scale, labels, test * scale) == base
    assert predictions(train[:, order], labels, test[:, order]) == base


def test_duplicating_every_feature_and_doubling_the_regularisation_leaves_predictions_unchanged():
    train, labels = blobs(30, 10, 3, seed=3, spread=2.0)
    test, _ = blobs(20, 10, 3, seed=4, spread=2.0)
    twice = predictions(np.hstack([train, train]), labels, np.hstack([test, test]), l2_reg=2048.0)
    assert twice == predictions(train, labels, test)


def test_separable_classes_are_all_found_and_shuffled_labels_give_chance():
    train, labels = blobs(200, 40, 10, seed=7, spread=0.1)
    test, test_labels = blobs(2000, 40, 10, seed=8, spread=0.1)
    ids = 3 * labels + 5  # class ids need not be 0 .. C - 1
    assert least_squares_accuracy(train, ids, test, 3 * test_labels + 5) == 1.0

    noise_train = np.random.default_rng(10).normal(size=(200, 40))
    noise_test = np.random.default_rng(11).normal(size=(2000, 40))
    assert least_squares_accuracy(noise_train, labels, noise_test, test_labels) == pytest.approx(
        0.1, abs=0.03
    )
