"""What the converters of whole transfer sets share: every image of each published split."""

import dataclasses
from collections.abc import Mapping, Sequence

from vitscale.curate.pack.config import Omissions
from vitscale.curate.pack.listing import Listing, References
from vitscale.curate.pack.vtab.examples import ExampleReference, ExampleReferences
from vitscale.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferSet:
    """A data set as published. sizes: the number of images of each split."""

    name: str
    num_classes: int
    sizes: Mapping[str, int]


def make_listing(
    published: TransferSet,
    source: str,
    splits: Mapping[str, Sequence[ExampleReference]],
    classes: Sequence[str] = (),
    *,
    details: Sequence[str] = (),
    deviations: Sequence[str] = (),
    omissions: Omissions | None = None,
) -> Listing:
    """All images of each split; the edition says whether they are the published ones.

    classes: the names of the classes, if the data set has any.
    details: what else to say about the set.
    deviations: why the set is not the published one, beside the numbers of images.

    Raises DataError for a label that the data set does not have, for an image that is listed
    twice, and for a split without images.
    """
    seen = dict[str, str]()
    for split, examples in splits.items():
        if not examples:
            raise DataError(f"{source}: {published.name} has no image in {split}; download the lists again")
        for example in examples:
            _check_labels(published, source, example)
            if example.name in seen:
                raise DataError(
                    f"{source}: {example.name} is listed twice, in {seen[example.name]} and {split}; "
                    "download the lists again"
                )
            seen[example.name] = split
    why = [
        f"{split} has {len(splits[split]):,} images instead of {size:,}"
        for split, size in published.sizes.items()
        if len(splits[split]) != size
    ]
    why += deviations
    held = ", ".join([*(f"{split} {len(examples):,}" for split, examples in splits.items()), *details])
    state = f"not the published set: {'; '.join(why)}" if why else "the published set"
    references: dict[str, References] = {split: ExampleReferences(rows) for split, rows in splits.items()}
    return Listing(
        splits=references,
        classes=tuple(classes),
        omissions=omissions or Omissions(),
        edition=f"{published.name}: {state} ({held})",
    )


def _check_labels(published: TransferSet, source: str, example: ExampleReference) -> None:
    for label in example.labels:
        if not 0 <= label < published.num_classes:
            raise DataError(
                f"{source}: {example.name} has the label {label}, but {published.name} has the labels 0 to "
                f"{published.num_classes - 1}; download it again"
            )
