"""Both losses by their definitions, and the first ones that the paper's heads must give."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from vitscale.errors import ConfigError
from vitscale.objectives.losses import LossConfig, compute_loss, to_targets


@pytest.mark.parametrize(("num_classes", "expected"), [(10, 2.302585), (1000, 6.907755)])
def test_softmax_starts_at_ln_c(num_classes: int, expected: float) -> None:
    targets = to_targets(torch.tensor([[3], [0]]), num_classes)
    loss = compute_loss(LossConfig(), torch.zeros(2, num_classes), targets)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_classes", "bias", "expected"), [(21843, -10.0, 10.9917), (1000, -6.9, 7.9073)])
def test_sigmoid_starts_where_the_bias_puts_it(num_classes: int, bias: float, expected: float) -> None:
    targets = to_targets(torch.tensor([[3], [0]]), num_classes)
    loss = compute_loss(LossConfig(name="sigmoid"), torch.full((2, num_classes), bias), targets)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert loss.item() == pytest.approx(num_classes * math.log1p(math.exp(bias)) - bias, rel=1e-6)


def test_labels_padded_with_minus_one_become_multi_hot() -> None:
    targets = to_targets(torch.tensor([[1, 3], [2, -1], [-1, -1]]), 4)
    assert targets.tolist() == [[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_sigmoid_sums_over_classes_and_averages_over_images() -> None:
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = [math.log1p(math.exp(x)) for x in (-1, -2, 0.5, -3)]  # -logit where the target is 1
    loss = compute_loss(LossConfig(name="sigmoid"), logits, targets)
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-6)


def test_16_bit_logits_are_scored_in_fp32() -> None:
    logits, targets = torch.linspace(-9, 9, 1000)[None].bfloat16(), to_targets(torch.tensor([[1]]), 1000)
    for config in (LossConfig(), LossConfig(name="sigmoid")):
        loss = compute_loss(config, logits, targets)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, compute_loss(config, logits.float(), targets))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_label_smoothing_is_that_of_pytorch_and_timm(name: Literal["softmax", "sigmoid"]) -> None:
    logits, labels = torch.linspace(-3, 3, 20).reshape(4, 5), torch.tensor([3, 0, 4, 4])
    loss = compute_loss(LossConfig(name=name, label_smoothing=0.2), logits, to_targets(labels[:, None], 5))
    if name == "softmax":
        expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    else:
        smooth = torch.full((4, 5), 0.2 / 5).scatter(1, labels[:, None], 0.8 + 0.2 / 5)
        expected = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_smoothing_out_of_range_is_refused(value: float) -> None:
    LossConfig(label_smoothing=0.0)
    with pytest.raises(ConfigError, match=rf"loss.label_smoothing {value} must lie in \[0, 1\)"):
        LossConfig(label_smoothing=value)
