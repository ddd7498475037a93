"""A linear probe: one linear layer on frozen features, trained by SGD, many rates at once."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitscale import distributed, rng
from vitscale.config import dotted, positive
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
from vitscale.optim.schedule import ScheduleConfig, learning_rate

MOMENTUM = 0.9
COSINE = ScheduleConfig(decay="cosine")
STD_EPSILON = 1e-6  # of MAE's BatchNorm before its probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(DevConfig):
    """A linear layer on standardised features, trained by SGD, besides the common keys.

    learning_rates:  to choose among, all trained at once; each falls by a cosine
    epochs, batch:   of the training
    seed:            of the order, too
    """

    kind: Literal["linear"] = "linear"
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    epochs: int = 30
    batch: int = 256

    def check(self, where: str) -> None:
        super().check(where)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(
                f"{dotted(where, 'learning_rates')} {list(self.learning_rates)} must list numbers above 0, "
                "like [0.01, 0.1]"
            )
        positive(where, epochs=self.epochs, batch=self.batch)


class LinearTask(ProbeTask[LinearConfig]):
    """The accuracy of the layer whose rate the dev part of the training set chose."""

    def check_sets(self) -> None:
        if len(self.config.learning_rates) > 1:
            check_dev_split(self.name, self.config, self.train.num_samples)

    def names(self, model: EvalModel) -> list[str]:
        return ["top1", "learning_rate"]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"top1": 0.45, "learning_rate": 0.1}, top1 as a fraction of 1."""
        config = self.config
        pair = self.extract_pair(model)
        device = distributed.device()
        mean, std = pair.train.double().mean(0), pair.train.double().std(0, correction=0) + STD_EPSILON
        x, labels = ((pair.train - mean) / std).to(device), pair.train_labels.to(device)

        def dev_scores(rates: list[float]) -> list[float]:
            fit_on, choose_by = dev_split(len(x), config.dev_fraction, config.seed)
            heads = train_heads(x[fit_on], labels[fit_on], pair.num_classes, rates, config)
            return [float((predict(x[choose_by], head) == labels[choose_by]).sum()) for head in heads]

        rate = best_of(config.learning_rates, dev_scores)
        (weights,) = train_heads(x, labels, pair.num_classes, [rate], config)
        queries = ((pair.test[own_rows(len(pair.test))] - mean) / std).to(device)
        (top1,) = accuracies([predict(queries, weights).cpu()], pair.test_labels)
        return dict(zip(self.names(model), (top1, rate), strict=True))


def predict(x: Float64[Tensor, "n D"], weights: Float64[Tensor, "D+1 C"]) -> Int64[Tensor, " n"]:
    return (x @ weights[:-1] + weights[-1]).argmax(1)


def train_heads(
    x: Float64[Tensor, "n D"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    rates: list[float],
    config: LinearConfig,
) -> Float64[Tensor, "L D+1 C"]:
    """A layer for each rate, from zeros, on the same batches. The last row is the bias."""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # [n, D+1]
    batch = min(config.batch, len(x))
    steps_per_epoch = len(x) // batch
    total = config.epochs * steps_per_epoch
    peak = x.new_tensor(rates)[:, None, None]  # [L, 1, 1]
    weights = x.new_zeros(len(rates), x.shape[1], num_classes)  # [L, D+1, C]
    momentum = torch.zeros_like(weights)
    for step in range(total):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            order = torch.from_numpy(rng.permutation(len(x), config.seed, "linear", epoch))
        chosen = order[position * batch : (position + 1) * batch].to(x.device)
        rows = x[chosen]  # [B, D+1]
        errors = (rows @ weights).softmax(-1)  # [L, B, C]: of the cross-entropy by the logits
        errors[:, torch.arange(batch, device=x.device), labels[chosen]] -= 1
        momentum = MOMENTUM * momentum + rows.T @ errors / batch
        # Training passes step + 1, which would give the last update a rate of 0.
        weights = weights - peak * learning_rate(step, total, 1.0, COSINE) * momentum
    return weights
