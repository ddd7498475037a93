"""k nearest neighbours by cosine similarity, with DINO's weighted votes. Nothing is trained."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from vitscale import distributed
from vitscale.config import positive
from vitscale.errors import DataError
from vitscale.evals.probe import ProbeConfig, ProbeTask, accuracies, own_rows
from vitscale.evals.task import EvalModel

_SIMILARITIES = 1 << 26  # that are computed at a time: 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig(ProbeConfig):
    """Votes of the nearest training images, besides the common keys.

    k:            how many of them vote, each number a result of its own
    temperature:  a neighbour of cosine similarity s votes with exp(s / temperature)
    """

    kind: Literal["knn"] = "knn"
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07

    def check(self, where: str) -> None:
        super().check(where)
        self.check_list(where, 1, k=self.k)
        positive(where, temperature=self.temperature)


class KnnTask(ProbeTask[KnnConfig]):
    """The accuracy of the votes, for each k."""

    def check_sets(self) -> None:
        most, num_samples = max(self.config.k), self.train.num_samples
        if most > num_samples:
            raise DataError(
                f"{self.name}: {self.config.train} holds {num_samples:,} images, fewer than the "
                f"{most:,} neighbours of k; lower k"
            )

    def names(self, model: EvalModel) -> list[str]:
        return [f"{k}nn" for k in self.config.k]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"10nn": 0.41, ...}, fractions of 1."""
        pair = self.extract_pair(model)
        device = distributed.device()
        train, labels = normalize(pair.train.to(device), dim=1), pair.train_labels.to(device)
        queries = normalize(pair.test[own_rows(len(pair.test))].to(device), dim=1)
        predictions = votes(train, labels, queries, self.config.k, self.config.temperature)
        shares = accuracies([prediction.cpu() for prediction in predictions], pair.test_labels)
        return dict(zip(self.names(model), shares, strict=True))


def votes(
    train: Float[Tensor, "n D"],
    labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    ks: Sequence[int],
    temperature: float,
) -> list[Int64[Tensor, " m"]]:
    """The class with most votes for each query, for each number of neighbours.

    Rows have length 1 (DINO eval_knn.py; DINOv2 eval/knn.py divides the weights by their sum,
    which changes no vote). Of classes with equal votes, the lowest wins.
    """
    num_classes = int(labels.max()) + 1
    winners: list[list[Tensor]] = [[] for _ in ks]
    for rows in queries.split(max(1, _SIMILARITIES // len(train))):
        nearest = (rows @ train.T).topk(max(ks), dim=1)  # [b, K], highest first
        similarities = nearest.values.double()  # [b, K]
        # Without the subtraction, which changes no vote, low temperatures overflow.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        for won, k in zip(winners, ks, strict=True):
            sums = weights.new_zeros(len(rows), num_classes)
            won.append(sums.scatter_add_(1, labels[nearest.indices[:, :k]], weights[:, :k]).argmax(1))
    return [torch.cat(won) for won in winners]
