"""k-means clusters of frozen features, found without labels and compared with the classes."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int
from torch.nn.functional import normalize

from vitscale import distributed
from vitscale.config import dotted
from vitscale.data.evalset import EvaluationSet
from vitscale.errors import ConfigError, DataError
from vitscale.evals.features import extract
from vitscale.evals.probe import check_single_labels, single_labels
from vitscale.evals.task import EvalModel, TaskConfig, open_shards
from vitscale.image_size import ImageSize

STARTS = 10  # of which the one with the smallest distances counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeansConfig(TaskConfig):
    """Clusters of the test set's features, of length 1, besides the common keys.

    clusters:  how many; 0 = as many as classes
    seed:      of the starts
    """

    kind: Literal["kmeans"] = "kmeans"
    clusters: int = 0
    seed: int = 0

    def check(self, where: str) -> None:
        super().check(where)
        if self.clusters < 0 or self.clusters == 1 or self.seed < 0:
            raise ConfigError(
                f"{dotted(where, 'clusters')} {self.clusters} must be 0, for as many as classes, or above 1, "
                f"and {dotted(where, 'seed')} {self.seed} not negative"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeansTask:
    """How well the clusters fit the classes."""

    name: str
    config: KMeansConfig
    test: EvaluationSet

    @classmethod
    def open(cls, name: str, config: KMeansConfig, image_size: ImageSize) -> "KMeansTask":
        test = open_shards(config.test, config, image_size)
        check_single_labels(test, f"{name}: {config.test}", config.kind)
        if config.clusters > test.num_samples:
            raise DataError(
                f"{name}: {config.test} holds {test.num_samples:,} images, fewer than the "
                f"{config.clusters:,} clusters; lower clusters"
            )
        return cls(name=name, config=config, test=test)

    def names(self, model: EvalModel) -> list[str]:
        return ["nmi", "accuracy"]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"nmi": 0.3, "accuracy": 0.4}: see agreement."""
        config = self.config
        rows, padded = extract(model, self.test, np.arange(self.test.num_samples), config.batch_size)

        def cluster() -> list[float]:
            from sklearn.cluster import KMeans

            labels = single_labels(padded.numpy(), f"{self.name}: {config.test}", config.kind)
            count = config.clusters or len(np.unique(labels))
            kmeans = KMeans(count, n_init=STARTS, random_state=config.seed)  # pyright: ignore[reportArgumentType]
            return list(agreement(kmeans.fit_predict(normalize(rows, dim=1).numpy()), labels))

        return dict(zip(self.names(model), distributed.on_main(cluster), strict=True))


def agreement(clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Normalised mutual information, and the accuracy if each cluster stands for one class.

    The assignment of clusters to classes is the one with the most hits (Hungarian algorithm).
    A cluster without a class of its own has none.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    hits = contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(hits, maximize=True)
    return float(normalized_mutual_info_score(labels, clusters)), float(
        hits[rows, columns].sum() / len(labels)
    )
