"""What the kinds share that judge frozen features by a training and a test set."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitscale import distributed, rng
from vitscale.config import dotted
from vitscale.data.evalset import EvaluationSet
from vitscale.errors import ConfigError, DataError
from vitscale.evals.features import extract, rank_block
from vitscale.evals.task import EvalModel, TaskConfig, open_shards
from vitscale.image_size import ImageSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(TaskConfig):
    """The keys of every such kind, besides the common ones.

    train:  the labelled training images; written like test
    """

    train: str = ""

    def check(self, where: str) -> None:
        super().check(where)
        if not self.train:
            raise ConfigError(
                f"{dotted(where, 'train')} is empty: {self.kind} needs training shards, "
                "like data/cifar10/train-*.tar"
            )

    def check_list(self, where: str, lowest: int, **lists: tuple[int, ...]) -> None:
        """Raise ConfigError unless each list has different whole numbers from `lowest` up."""
        for key, values in lists.items():
            if not values or min(values) < lowest or len(set(values)) < len(values):
                raise ConfigError(
                    f"{dotted(where, key)} {list(values)} must list different whole numbers "
                    f"from {lowest} up, like [{lowest}]"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevConfig(ProbeConfig):
    """The keys of kinds that choose a value by a part of the training set.

    dev_fraction:  of the training images, to choose by; the chosen value is trained on all
    seed:          of that choice
    """

    dev_fraction: float = 0.1
    seed: int = 0

    def check(self, where: str) -> None:
        super().check(where)
        if not 0 < self.dev_fraction < 1:
            raise ConfigError(
                f"{dotted(where, 'dev_fraction')} {self.dev_fraction} must lie in (0, 1), like 0.1"
            )
        if self.seed < 0:
            raise ConfigError(f"{dotted(where, 'seed')} {self.seed} must not be negative")


C = TypeVar("C", bound=ProbeConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturePair:
    """Features of both sets, and their classes as 0 to num_classes - 1 in rising order."""

    train: Float[Tensor, "n D"]
    train_labels: Int64[Tensor, " n"]
    test: Float[Tensor, "m D"]
    test_labels: Int64[Tensor, " m"]

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeTask(abc.ABC, Generic[C]):
    """A task with both sets open; each kind has its own `names` and `run`."""

    name: str
    config: C
    train: EvaluationSet
    test: EvaluationSet

    @classmethod
    def open(cls, name: str, config: C, image_size: ImageSize) -> "ProbeTask[C]":
        """Raises DataError for missing shards, and for sets that do not fit the config."""
        train, test = (open_shards(pattern, config, image_size) for pattern in (config.train, config.test))
        for images, pattern in ((train, config.train), (test, config.test)):
            check_single_labels(images, f"{name}: {pattern}", config.kind)
        task = cls(name=name, config=config, train=train, test=test)
        task.check_sets()
        return task

    def check_sets(self) -> None:
        """Raise DataError for sets that do not fit the config."""

    @abc.abstractmethod
    def names(self, model: EvalModel) -> list[str]:
        """As Task.names."""

    @abc.abstractmethod
    def run(self, model: EvalModel) -> dict[str, float]:
        """As Task.run."""

    def extract_pair(self, model: EvalModel) -> FeaturePair:
        """The features of all images of both sets, on every rank; every rank calls it.

        Raises DataError for images without one label, and for a test class that is not trained.
        """
        (train, train_padded), (test, test_padded) = (
            extract(model, images, np.arange(images.num_samples), self.config.batch_size)
            for images in (self.train, self.test)
        )
        with distributed.alike():
            pool = self.pool_labels(train_padded)
            targets = self.test_labels(test_padded, pool)
        classes = np.unique(pool)
        return FeaturePair(
            train=train,
            train_labels=torch.from_numpy(np.searchsorted(classes, pool)),
            test=test,
            test_labels=torch.from_numpy(np.searchsorted(classes, targets)),
        )

    def pool_labels(self, padded: Int64[Tensor, "n M"]) -> Int64[np.ndarray, " n"]:
        """The one label of each training sample."""
        return single_labels(padded.numpy(), f"{self.name}: {self.config.train}", self.config.kind)

    def test_labels(
        self, padded: Int64[Tensor, "n M"], pool: Int64[np.ndarray, " p"]
    ) -> Int64[np.ndarray, " n"]:
        """The one label of each test sample. Raises DataError for one not in the pool."""
        where = f"{self.name}: {self.config.test}"
        singles = single_labels(padded.numpy(), where, self.config.kind)
        unknown = np.setdiff1d(singles, pool)
        if len(unknown):
            label = self.test.index.named(int(unknown[0]))
            raise DataError(
                f"{where}: class {label} does not occur in the training shards "
                f"{self.config.train}; give both sets of one data set"
            )
        return singles


def check_single_labels(images: EvaluationSet, source: str, kind: str) -> None:
    """Raise DataError, naming `source`, if the index knows of several labels of a sample."""
    most = images.index.max_labels
    if most > 1:
        raise DataError(
            f"{source}: there are samples with {most} labels, but {kind} needs exactly one; "
            "give shards with one label per image"
        )


def single_labels(labels: Int64[np.ndarray, "n M"], source: str, kind: str) -> Int64[np.ndarray, " n"]:
    """The one label of each sample. Raises DataError, naming `source`, for none or several."""
    counts = (labels >= 0).sum(axis=1)
    if (counts != 1).any():
        position = int(np.argmax(counts != 1))
        raise DataError(
            f"{source}: sample {position} has {counts[position]} labels, but {kind} needs exactly one; "
            "give shards with one label per image"
        )
    return labels[np.arange(len(labels)), (labels >= 0).argmax(axis=1)]


def dev_split(
    num_samples: int, fraction: float, seed: int
) -> tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]:
    """Positions to fit on, and positions to choose by: a seeded share of the training set."""
    order = torch.from_numpy(rng.permutation(num_samples, seed, "dev"))
    held_out = num_dev(num_samples, fraction)
    return order[held_out:], order[:held_out]


def num_dev(num_samples: int, fraction: float) -> int:
    """How many of the training set are to choose by."""
    return max(1, round(fraction * num_samples))


def check_dev_split(name: str, config: DevConfig, num_samples: int) -> None:
    """Raise DataError if the dev part leaves nothing to fit on."""
    held_out = num_dev(num_samples, config.dev_fraction)
    if held_out >= num_samples:
        raise DataError(
            f"{name}: dev_fraction {config.dev_fraction} holds out {held_out:,} of the {num_samples:,} "
            f"images in {config.train}, which leaves none to fit on; lower it, or give more images"
        )


def own_rows(num_samples: int) -> slice:
    """This rank's block of the rows of a test set."""
    block, _ = rank_block(num_samples, distributed.rank(), distributed.world_size())
    return slice(block.start, block.stop)


def accuracies(predictions: Sequence[Int64[Tensor, " b"]], labels: Int64[Tensor, " m"]) -> list[float]:
    """The shares of right predictions; every rank calls it.

    predictions: several of this rank's block, own_rows(m). labels: of the whole test set.
    """
    own = labels[own_rows(len(labels))]
    right = [float((prediction == own).sum()) for prediction in predictions]
    return [count / len(labels) for count in distributed.all_reduce_sum(right)]


def best_of(choices: Sequence[float], scores_of: Callable[[list[float]], list[float]]) -> float:
    """The choice of the highest score, the first of several; every rank calls it.

    scores_of gets this rank's share of them in one call. One choice alone is not scored.
    """
    if len(choices) == 1:
        return choices[0]
    scores = [0.0] * len(choices)
    mine = slice(distributed.rank(), None, distributed.world_size())
    if share := list(choices[mine]):
        scores[mine] = scores_of(share)
    scores = distributed.all_reduce_sum(scores)
    return choices[scores.index(max(scores))]
