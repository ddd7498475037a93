"""What the head says of each image: written out, and summed up by class and by confidence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitscale import distributed
from vitscale.data.evalset import EvaluationSet
from vitscale.system import atomic

TOP = 5
BINS = 15  # of the calibration error, as in Guo et al., "On Calibration of Modern Neural Networks"
NUM_CONFUSIONS = 20  # that a summary lists


class Counts(NamedTuple):
    """How many samples have a label, how many are right, and the sum of their losses."""

    num_samples: int
    top1: int
    top5: int
    loss: float = 0.0


class Predictions(NamedTuple):
    """Of each image the classes of the highest logits, highest first, and their softmax."""

    classes: Int64[Tensor, "n k"]
    probabilities: Float[Tensor, "n k"]
    labels: Int64[Tensor, "n M"]
    losses: Float[Tensor, " n"]

    @classmethod
    def of(
        cls, logits: Float[Tensor, "n C"], labels: Int64[Tensor, "n M"], losses: Float[Tensor, " n"]
    ) -> "Predictions":
        """With the TOP highest classes, or all if they are fewer."""
        classes = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        return cls(classes, logits.softmax(1).gather(1, classes), labels, losses)

    def gathered(self) -> "Predictions":
        """Those of all ranks, in rank order; every rank calls it."""
        return Predictions(*map(distributed.all_gather_rows, self))

    def right(self) -> Bool[Tensor, " n"]:
        """Whether the first class is one of the labels, which are padded with -1."""
        return (self.labels == self.classes[:, :1]).any(1)

    def counts(self) -> Counts:
        """How many have labels, have one as the first class, and have one among the classes.

        An image without labels counts neither as right nor as wrong, which is the rule of
        ImageNet-ReaL (big_vision evaluators/classification.py, lines 40-52).
        """
        hits = (self.labels[:, None, :] == self.classes[:, :, None]).any(2)  # [n, k]
        return Counts(
            num_samples=int((self.labels >= 0).any(1).sum()),
            top1=int(hits[:, 0].sum()),
            top5=int(hits.any(1).sum()),
            loss=float(self.losses.double().sum()),
        )

    def labelled(self) -> "Predictions":
        """Those of images that have a label: the others are not scored."""
        has_label = (self.labels >= 0).any(1)
        return Predictions(*(column[has_label] for column in self))


def write(path: str | Path, predictions: Predictions, test: EvaluationSet) -> None:
    """Write a line of JSON for each image:

    {"key": "n01440764_10026", "labels": [0], "classes": [0, 391, 758, 394, 0],
     "probabilities": [0.91, 0.02, 0.01, 0.01, 0.0], "right": true}
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.named(path), atomic.appearing(path) as temporary, open(temporary, "w") as file:
        for row in _rows(predictions, test):
            file.write(json.dumps(row) + "\n")


def _rows(predictions: Predictions, test: EvaluationSet) -> Iterator[dict[str, Any]]:
    right = predictions.right().tolist()
    columns = zip(test.keys(), *predictions[:3], right, strict=True)
    for key, classes, probabilities, labels, is_right in columns:
        yield {
            "key": key,
            "labels": [label for label in labels.tolist() if label >= 0],
            "classes": classes.tolist(),
            "probabilities": [round(value, 6) for value in probabilities.tolist()],
            "right": is_right,
        }


def summary(predictions: Predictions, test: EvaluationSet) -> dict[str, Any]:
    """Accuracy by class, what is most often taken for what, and how far to trust probabilities.

    {"calibration_error": 0.03,
     "per_class": [{"class": 3, "name": "cat", "num_samples": 1000, "accuracy": 0.41}, ...],
     "confusions": [{"class": "cat", "taken_for": "dog", "count": 212}, ...]}

    An image of several labels counts in each of their classes, and is confused with none.
    """
    scored = predictions.labelled()
    right, first = scored.right(), scored.classes[:, 0]
    rows, columns = (scored.labels >= 0).nonzero(as_tuple=True)
    labels = scored.labels[rows, columns]
    totals = torch.bincount(labels)
    hits = torch.bincount(labels, weights=(first[rows] == labels).double())
    return {
        "calibration_error": calibration_error(scored.probabilities[:, 0], right),
        "per_class": [
            {
                "class": label,
                "name": test.named(label),
                "num_samples": int(total),
                "accuracy": float(hits[label] / total),
            }
            for label, total in enumerate(totals)
            if total
        ],
        "confusions": [
            {"class": test.named(a), "taken_for": test.named(b), "count": count}
            for a, b, count in confusions(scored)[:NUM_CONFUSIONS]
        ],
    }


def confusions(predictions: Predictions) -> list[tuple[int, int, int]]:
    """(class, the other that it is taken for, how often), the most frequent first.

    This is what is beside the diagonal of the confusion matrix, of images with one label.
    """
    one = (predictions.labels >= 0).sum(1) == 1
    labels, first = predictions.labels[one].amax(1), predictions.classes[one, 0]
    wrong = torch.stack([labels, first], 1)[labels != first]
    pairs, counts = torch.unique(wrong, dim=0, return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)
    return [(*pair, count) for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)]


def calibration_error(confidences: Float[Tensor, " n"], right: Bool[Tensor, " n"]) -> float:
    """|accuracy - mean confidence| of BINS equal bins, weighted by their shares of images."""
    bins = (confidences.double() * BINS).long().clamp(max=BINS - 1)
    gaps = torch.bincount(bins, weights=right.double() - confidences.double(), minlength=BINS)
    return float(gaps.abs().sum() / len(confidences))
