"""Counting right answers: several labels, none, and ranks."""

import torch

from vitscale.evals.classify import Counts, topk_correct

LOGITS = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]])  # class 0 first, class 4 fifth


def targets(*rows: list[int]) -> torch.Tensor:
    out = torch.zeros(len(rows), 7)
    for row, classes in enumerate(rows):
        out[row, classes] = 1.0
    return out


def test_top1_is_the_highest_logit_and_top5_any_of_five():
    logits = LOGITS.expand(4, 7)
    assert topk_correct(logits, targets([0], [1], [4], [5])) == Counts(num_samples=4, top1=1, top5=3)


def test_any_of_several_labels_is_right():
    assert topk_correct(LOGITS, targets([6, 0])) == Counts(1, 1, 1)
    assert topk_correct(LOGITS, targets([6, 4])) == Counts(1, 0, 1)
    assert topk_correct(LOGITS, targets([6, 5])) == Counts(1, 0, 0)


def test_examples_without_a_label_count_nowhere():
    assert topk_correct(LOGITS.expand(3, 7), targets([], [0], [])) == Counts(1, 1, 1)
    assert topk_correct(LOGITS[:0], targets()) == Counts(0, 0, 0)


def test_fewer_than_five_classes_are_all_in_the_top5():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert topk_correct(logits, torch.tensor([[0.0, 0.0, 1.0]])) == Counts(1, 0, 1)


def test_counts_add_up():
    assert Counts(3, 1, 2).plus(Counts(4, 0, 1)) == Counts(7, 1, 3)
