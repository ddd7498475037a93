"""Evaluation tasks as a config names them ([evals.NAME]): open the data early, then run on any model, as
often as wanted.

A task asks for features or logits and knows nothing of trainers or checkpoints.
"""

import dataclasses
import itertools
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale import distributed
from vitscale.config import ConfigError, positive
from vitscale.data.evalset import EvaluationSet
from vitscale.evals.classify import Counts, topk_correct
from vitscale.evals.features import extract, own_indices
from vitscale.evals.fewshot import L2_REG, least_squares_accuracy, support_indices
from vitscale.losses import to_targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation ([evals.NAME]).

    kind: "fewshot" is least squares on frozen features of a few training images; "classify" is the accuracy
    of the head.
    train, test: shards (glob, brace pattern, URL) or an index.json; train is the pool that few-shot draws
    from.
    crop: "resize" squeezes to a square; "center" resizes the short side to image_size * 256 / 224 and crops
    the centre.
    batch_size, num_workers: per rank.
    """

    kind: Literal["fewshot", "classify"] = "classify"
    train: str = ""
    test: str = ""
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    l2_reg: float = L2_REG
    every_steps: int = 1000
    crop: Literal["resize", "center"] = "resize"
    batch_size: int = 256
    num_workers: int = 0

    def __post_init__(self) -> None:
        where = "evals.NAME"
        if not self.test:
            raise ConfigError(
                f"{where}.test is empty: an evaluation needs test shards, like data/cifar10/test-*.tar"
            )
        if self.kind == "fewshot" and not self.train:
            raise ConfigError(
                f"{where}.train is empty: fewshot needs training shards, like data/cifar10/train-*.tar"
            )
        if self.kind != "fewshot" and self.train:
            raise ConfigError(
                f'{where}.train is set, but only kind = "fewshot" reads it; remove it or set the kind'
            )
        for key in ("shots", "seeds"):
            values = getattr(self, key)
            lowest = 1 if key == "shots" else 0
            if not values or min(values) < lowest or len(set(values)) < len(values):
                raise ConfigError(
                    f"{where}.{key} {list(values)} must list different whole numbers from {lowest} up, like "
                    f"[{lowest}]"
                )
        positive(where, l2_reg=self.l2_reg, every_steps=self.every_steps, batch_size=self.batch_size)
        if self.num_workers < 0:
            raise ConfigError(
                f"{where}.num_workers {self.num_workers} must not be negative; 0 decodes in the main process"
            )


@runtime_checkable
class EvalModel(Protocol):
    """What a task needs of a model: batches come as uint8 on the CPU, results may lie on any device."""

    @property
    def image_size(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]: ...

    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotTask:
    """Mean accuracy and population deviation over the seeds, for each number of shots."""

    name: str
    config: EvalConfig
    train: EvaluationSet
    test: EvaluationSet

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"1shot": ..., "1shot_std": ..., ...}, fractions of 1. Every rank calls it and gets the same."""
        config = self.config
        pool = single_labels(self.train.labels, f"{self.name}: {config.train}")
        draws = {pair: support_indices(pool, *pair) for pair in itertools.product(config.shots, config.seeds)}
        # Only images that some draw needs are decoded; the pool may be all of ImageNet.
        union = np.unique(np.concatenate(list(draws.values())))
        support, _ = extract(model.features, self.train, union, config.batch_size)
        test, padded = extract(model.features, self.test, np.arange(self.test.num_samples), config.batch_size)
        test_labels = single_labels(padded.numpy(), f"{self.name}: {config.test}")
        unknown = np.setdiff1d(test_labels, pool)
        if len(unknown):
            raise ConfigError(
                f"{self.name}: {config.test}: class {unknown[0]} does not occur in the training shards "
                f"{config.train}; give both sets of one data set"
            )

        # Each rank fits its share of the draws; the sum then holds every accuracy, equal on all ranks.
        accuracies = [0.0] * len(draws)
        for i, indices in enumerate(draws.values()):
            if i % distributed.world_size() == distributed.rank():
                rows = support.numpy()[np.searchsorted(union, indices)]
                accuracies[i] = least_squares_accuracy(
                    rows, pool[indices], test.numpy(), test_labels, config.l2_reg
                )
        by_shots = np.reshape(distributed.all_reduce_sum(accuracies), (len(config.shots), len(config.seeds)))
        results: dict[str, float] = {}
        for shots, values in zip(config.shots, by_shots, strict=True):
            results[f"{shots}shot"] = float(values.mean())
            results[f"{shots}shot_std"] = float(values.std())
        return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyTask:
    """Accuracy of the model's own head on a labelled set; several labels an image are all right."""

    name: str
    config: EvalConfig
    test: EvaluationSet

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"top1": ..., "top5": (if C > 5), "num_samples": ...}. Every rank calls it and gets the same."""
        indices, remaining = own_indices(np.arange(self.test.num_samples))
        counts = Counts(0, 0, 0)
        for images, labels in self.test.batches(indices, self.config.batch_size):
            own = max(0, min(len(images), remaining))
            logits = model.logits(images).float().cpu()[:own]
            counts = counts.plus(topk_correct(logits, self._targets(labels[:own], model.num_classes)))
            remaining -= own
        num_samples, top1, top5 = distributed.all_reduce_sum([float(count) for count in counts])
        if num_samples == 0:
            raise ConfigError(
                f"{self.name}: {self.config.test}: no sample has a label, so there is nothing to score"
            )
        results = {"top1": top1 / num_samples}
        if model.num_classes > 5:
            results["top5"] = top5 / num_samples
        return {**results, "num_samples": int(num_samples)}

    def _targets(self, labels: Int64[Tensor, "B M"], num_classes: int) -> Float[Tensor, "B C"]:
        if labels.numel() and labels.max() >= num_classes:
            raise ConfigError(
                f"{self.name}: {self.config.test}: class {int(labels.max())} does not exist in a model of "
                f"{num_classes} classes; give the test set that the head was trained for"
            )
        return to_targets(labels, num_classes)


def open_task(name: str, config: EvalConfig, image_size: int) -> FewShotTask | ClassifyTask:
    """Open the data, so that a missing shard shows early. Raises ConfigError or DataError."""

    def opened(pattern: str) -> EvaluationSet:
        return EvaluationSet.open(
            pattern, image_size=image_size, crop=config.crop, num_workers=config.num_workers
        )

    if config.kind == "fewshot":
        return FewShotTask(name=name, config=config, train=opened(config.train), test=opened(config.test))
    return ClassifyTask(name=name, config=config, test=opened(config.test))


def run_task(name: str, config: EvalConfig, model: EvalModel) -> dict[str, float]:
    """Open the task `name` and run it once. Every rank calls it and gets the same."""
    return open_task(name, config, model.image_size).run(model)


def single_labels(labels: Int64[np.ndarray, "n M"], source: str) -> Int64[np.ndarray, " n"]:
    """The one label of each sample. Raises ConfigError, naming `source`, where there are none or several."""
    counts = (labels >= 0).sum(axis=1)
    if (counts != 1).any():
        position = int(np.argmax(counts != 1))
        raise ConfigError(
            f"{source}: sample {position} has {counts[position]} labels, but few-shot needs exactly one"
        )
    return labels[np.arange(len(labels)), (labels >= 0).argmax(axis=1)]
