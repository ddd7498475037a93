"""Top-1 and top-5 accuracy, for one label an image or several."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Counts(NamedTuple):
    """How many examples count, and how many of those are right."""

    num_samples: int
    top1: int
    top5: int

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def topk_correct(logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"]) -> Counts:
    """Count the examples whose highest logit, and one of whose 5 highest, lies at a positive label.

    targets: multi-hot. An example without any label is left out of numerator and denominator, which is also
    the rule of ImageNet-ReaL (big_vision evaluators/classification.py, lines 40-52). With fewer than 5
    classes, top5 looks at all.
    """
    positive = targets > 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5], highest first
    hits = positive.gather(1, best)  # an example without labels has no hit
    return Counts(
        num_samples=int(positive.any(dim=1).sum()),
        top1=int(hits[:, 0].sum()),
        top5=int(hits.any(dim=1).sum()),
    )
