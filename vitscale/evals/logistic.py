"""Logistic regression on frozen features; a part of the training set chooses the penalty."""

import dataclasses
import math
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from vitscale import distributed
from vitscale.config import dotted
from vitscale.errors import ConfigError
from vitscale.evals.probe import (
    DevConfig,
    ProbeTask,
    accuracies,
    best_of,
    check_dev_split,
    dev_split,
    own_rows,
)
from vitscale.evals.task import EvalModel

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticConfig(DevConfig):
    """Multinomial logistic regression, besides the common keys.

    c:  the inverse penalties to choose among; one alone is taken
    """

    kind: Literal["logistic"] = "logistic"
    c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def check(self, where: str) -> None:
        super().check(where)
        if not self.c or not all(0 < value < math.inf for value in self.c):
            raise ConfigError(f"{dotted(where, 'c')} {list(self.c)} must list numbers above 0, like [1.0]")


class LogisticTask(ProbeTask[LogisticConfig]):
    """The accuracy of the regression that the dev part of the training set chose."""

    def check_sets(self) -> None:
        if len(self.config.c) > 1:
            check_dev_split(self.name, self.config, self.train.num_samples)

    def names(self, model: EvalModel) -> list[str]:
        return ["top1", "c"]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"top1": 0.45, "c": 0.1}, top1 as a fraction of 1."""
        config = self.config
        pair = self.extract_pair(model)
        device = distributed.device()
        x, labels = pair.train.to(device, torch.float64), pair.train_labels.to(device)

        def dev_accuracy(c: float) -> float:
            fit_on, choose_by = dev_split(len(x), config.dev_fraction, config.seed)
            weights = fit(x[fit_on], labels[fit_on], pair.num_classes, c)
            return float((predict(x[choose_by], weights) == labels[choose_by]).double().mean())

        c = best_of(config.c, lambda choices: [dev_accuracy(c) for c in choices])
        weights = fit(x, labels, pair.num_classes, c)
        queries = pair.test[own_rows(len(pair.test))].to(device, torch.float64)
        (top1,) = accuracies([predict(queries, weights).cpu()], pair.test_labels)
        return dict(zip(self.names(model), (top1, c), strict=True))


def predict(
    x: Float64[Tensor, "n D"], weights: tuple[Float64[Tensor, "D C"], Float64[Tensor, " C"]]
) -> Int64[Tensor, " n"]:
    return (x @ weights[0] + weights[1]).argmax(1)


def fit(
    x: Float64[Tensor, "n D"], labels: Int64[Tensor, " n"], num_classes: int, c: float
) -> tuple[Float64[Tensor, "D C"], Float64[Tensor, " C"]]:
    """The weights w and the biases b that minimise what scikit-learn's LogisticRegression does:

        |w|^2 / 2  +  c sum_i cross_entropy(x_i w + b, label_i)

    L-BFGS needs few steps where the curvature is 1 in all directions. Along a right singular
    vector v of the centred x, of singular value s, it is about 1 + c h s^2, where
    h = (1 - 1 / C) / C is that of the loss at zero weights. So each v is scaled by
    1 / sqrt(1 + c h s^2).
    """
    mean = x.mean(0)
    _, s, v_t = torch.linalg.svd(x - mean, full_matrices=False)  # [r], [r, D]
    h = (1 - 1 / num_classes) / num_classes
    directions = v_t.T / (1 + c * h * s.square()).sqrt()  # [D, r]
    z = (x - mean) @ directions  # [n, r]
    norms = directions.square().sum(0)[:, None]  # of the columns, which are orthogonal
    w, b = z.new_zeros(z.shape[1], num_classes), z.new_zeros(num_classes)
    # The biases are not penalised; their scale is that of the sum over all samples.
    unit = 1 / math.sqrt(max(1.0, c * h * len(x)))
    optimizer = torch.optim.LBFGS(
        [w.requires_grad_(), b.requires_grad_()],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        loss = c * cross_entropy(z @ w + unit * b, labels, reduction="sum")
        loss = loss + (norms * w.square()).sum() / 2
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    weights = directions @ w.detach()
    return weights, unit * b.detach() - mean @ weights
