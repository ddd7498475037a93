"""Counting right answers: several labels, none, and few classes."""

import torch

from vitscale.evals.predictions import Counts, Predictions

LOGITS = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]])  # class 0 first, class 4 fifth


def counts(logits: torch.Tensor, *rows: list[int]) -> Counts:
    """Of images with these labels, at most 2."""
    padded = torch.tensor([[*row, -1, -1][:2] for row in rows], dtype=torch.int64).reshape(-1, 2)
    return Predictions.of(logits, padded, torch.zeros(len(rows))).counts()


def test_top1_is_the_highest_logit_and_top5_any_of_five():
    assert counts(LOGITS.expand(4, 7), [0], [1], [4], [5]) == Counts(num_samples=4, top1=1, top5=3)


def test_any_of_several_labels_is_right():
    assert counts(LOGITS, [6, 0]) == Counts(1, 1, 1)
    assert counts(LOGITS, [6, 4]) == Counts(1, 0, 1)
    assert counts(LOGITS, [6, 5]) == Counts(1, 0, 0)


def test_examples_without_a_label_count_nowhere():
    assert counts(LOGITS.expand(3, 7), [], [0], []) == Counts(1, 1, 1)
    assert counts(LOGITS[:0]) == Counts(0, 0, 0)


def test_fewer_than_five_classes_are_all_in_the_top5():
    assert counts(torch.tensor([[3.0, 2.0, 1.0]]), [2]) == Counts(1, 0, 1)


def test_the_second_class_is_not_right():
    predictions = Predictions.of(LOGITS.expand(2, 7), torch.tensor([[0], [1]]), torch.zeros(2))
    assert predictions.right().tolist() == [True, False]
