"""Accuracy of a model's own head: top-1 and top-5, for one label per image or several."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitscale import distributed
from vitscale.config import dotted
from vitscale.data.evalset import EvaluationSet
from vitscale.data.sources import Source
from vitscale.errors import ConfigError, DataError
from vitscale.evals.features import check_finite, finite_rows, own_indices
from vitscale.evals.predictions import Counts, Predictions
from vitscale.evals.task import EvalModel, TaskConfig, open_shards, open_split
from vitscale.image_size import ImageSize
from vitscale.objectives.losses import LossConfig, sample_losses, to_targets

_FEWSHOT_KEYS = ("train", "shots", "seeds", "l2_reg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TaskConfig):
    """Accuracy of the head on a labelled test set, besides the common keys.

    split:      "validation" scores the samples that data.validation_fraction keeps from
                training, instead of `test`
    label_map:  a JSON file from the labels of `test` to the model's, as data.label_map; "" = as
                they are, whatever data.label_map is
    """

    kind: Literal["classify"] = "classify"
    split: Literal["", "validation"] = ""
    label_map: str = ""

    def check_test(self, where: str) -> None:
        if not self.split:
            super().check_test(where)
        elif self.test:
            raise ConfigError(
                f"{dotted(where, 'test')} and {dotted(where, 'split')} are both set, and either says what to "
                f'score; for test shards, set {dotted(where, "split")} = ""'
            )
        elif self.label_map:
            raise ConfigError(
                f"{dotted(where, 'label_map')} is for test shards: data.label_map maps the labels of a "
                "validation split; leave it out"
            )

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out the keys of few-shot that earlier versions wrote into every evaluation.

        They are left out only as those versions wrote them: all at once, and `train` empty.
        """
        if all(key in values for key in _FEWSHOT_KEYS) and not values["train"]:
            return {key: value for key, value in values.items() if key not in _FEWSHOT_KEYS}
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyTask:
    """Counts how often the head is right. Of several labels of an image, any one will do."""

    name: str
    config: ClassifyConfig
    test: EvaluationSet
    loss: LossConfig | None  # of the training, for its validation split; None = none is computed

    @classmethod
    def open(
        cls,
        name: str,
        config: ClassifyConfig,
        image_size: ImageSize,
        source: Source | None = None,
        loss: LossConfig | None = None,
    ) -> "ClassifyTask":
        """source, loss: of the training, for its validation split."""
        if not config.split:
            test, loss = open_shards(config.test, config, image_size, config.label_map), None
        elif source is None or not len(source.held_out):
            raise ConfigError(f"{name}: these training data have no validation split; give test shards")
        else:
            test = open_split(source, config, image_size)
        return cls(name=name, config=config, test=test, loss=loss)

    def names(self, model: EvalModel) -> list[str]:
        top5, loss = ["top5"] if model.num_classes > 5 else [], ["loss"] if self.loss else []
        return ["top1", *top5, *loss, "num_samples"]

    def run(self, model: EvalModel) -> dict[str, float]:
        """{"top1": 0.6, "top5": 0.9, "num_samples": 10000}; top5 with more than 5 classes.

        Of a validation split also its "loss", without label smoothing.
        """
        counts = self.predict(model).counts()
        *whole, loss = distributed.all_reduce_sum(list(map(float, counts)))
        return self.results(Counts(*map(int, whole), loss=loss), model)

    def predict(self, model: EvalModel) -> Predictions:
        """The predictions of this rank's share of the images, in order; every rank calls it.

        Raises NotFinite on all ranks if a logit of any image is not.
        """
        self.check_labels(model.num_classes)
        indices, count = own_indices(np.arange(self.test.num_samples))
        parts: list[Predictions] = []
        finite: list[Bool[Tensor, " B"]] = []
        batches = self.test.batches(indices, self.config.batch_size, num_classes=model.num_classes)
        for images, labels in batches:
            logits = model.logits(images).float().cpu()
            finite.append(finite_rows(logits))
            parts.append(Predictions.of(logits, labels, self._losses(logits, labels)))
        self.test.report_left_out()
        own = [int(torch.cat(finite)[:count].sum()), count]
        check_finite("logits", *distributed.all_reduce_sum_int(own))
        return Predictions(*(torch.cat(column)[:count] for column in zip(*parts, strict=True)))

    def _losses(self, logits: Float[Tensor, "B C"], labels: Int64[Tensor, "B M"]) -> Float[Tensor, " B"]:
        """Of each sample; 0 without a label, and where none is computed."""
        if not self.loss:
            return logits.new_zeros(len(logits))
        targets = to_targets(labels, logits.shape[1])
        losses = sample_losses(dataclasses.replace(self.loss, label_smoothing=0.0), logits, targets)
        return losses * targets.any(1)

    def results(self, counts: Counts, model: EvalModel) -> dict[str, float]:
        """The numbers of run() from the counts of all ranks."""
        if counts.num_samples == 0:
            where, way_out = self.config.test, "give shards with labels"
            if self.config.split:
                where, way_out = self.config.split, "the warnings say what is wrong with them"
            raise DataError(
                f"{self.name}: {where}: no sample has a label that counts, so there is nothing to score; "
                f"{way_out}",
                shared=True,
            )
        sums = {"top1": counts.top1, "top5": counts.top5, "loss": counts.loss}
        results = {name: value / counts.num_samples for name, value in sums.items()}
        results["num_samples"] = counts.num_samples
        return {name: results[name] for name in self.names(model)}

    def check_labels(self, num_classes: int) -> None:
        """Raise DataError for a class that a model of so many does not have."""
        label = self.test.max_label
        if label >= num_classes and not self.config.split:
            raise DataError(
                f"{self.name}: {self.config.test}: class {self.test.named(label)} does not exist in a "
                f"model of {num_classes} classes; give the test set that the head was trained for",
                shared=True,
            )
