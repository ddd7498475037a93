"""Whether shards are sorted by class: then neighbours have more labels in common than by luck.

A chunk is read as a whole, so where neighbours are alike, batches that are close in time are
alike as well.
"""

import dataclasses
import math
from collections.abc import Mapping

CLUSTERED, SORTED = 0.1, 0.9  # degrees; from 0.1 on, the shares of classes vary twice as much
_DEVIATIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How alike consecutive samples of a shard are, over all shards.

    pairs: their number. mean, chance: the labels that two of them have in common, on average,
    and what it would be in random order. degree: 0 for random order, 1 where neighbours have
    the same labels. is_clustered: whether the degree matters, and is not by chance.
    """

    pairs: int
    mean: float
    chance: float
    degree: float
    is_clustered: bool

    def describe(self) -> str:
        """What a person should know about it, without the way out."""
        word = "sorted" if self.degree > SORTED else "clustered"
        return (
            f"the shards are {word} by class (neighbours have {self.mean:.2f} labels in common, "
            f"{self.chance:.2f} by chance), so batches that are close in time repeat the same classes "
            "(docs/data.md#sorted-shards)"
        )


def compare(
    pairs: int, shared_labels: int, label_counts: Mapping[int, int], num_samples: int, max_labels: int
) -> Neighbours:
    """Compare neighbours with what the class counts alone would give.

    pairs: of neighbours. shared_labels: added up over them. num_samples: that can be used, with
    at most max_labels labels each. Two samples in random order have the label c in common with
    the chance n_c (n_c - 1) / (n (n - 1)); the sum over c is exact for several labels, too.
    """
    pairs_of_all = max(1, num_samples * (num_samples - 1))
    chance = sum(count * (count - 1) for count in label_counts.values()) / pairs_of_all
    most = sum(label_counts.values()) / max(1, num_samples)  # labels of a sample
    mean = shared_labels / max(1, pairs)
    degree = (mean - chance) / (most - chance) if pairs and most > chance else 0.0
    # A number of labels in common, X <= max_labels, has a variance of at most max_labels E[X].
    by_chance = _DEVIATIONS * (1 + math.sqrt(max_labels * chance * pairs))
    is_clustered = degree >= CLUSTERED and shared_labels - chance * pairs > by_chance
    return Neighbours(pairs=pairs, mean=mean, chance=chance, degree=degree, is_clustered=is_clustered)
