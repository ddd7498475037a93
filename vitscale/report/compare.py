"""Compares two checkpoints or exports: which tensors differ, and by how much; config and facts.

Two are equal if they hold the same weights at the same point of the same experiment. Where the
runs were, how fast, how often they saved and on how many ranks may differ: such differences are
reported but do not count.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitscale.report.contents import Contents, chunks
from vitscale.report.text import shape_text, table
from vitscale.run_dir.continuation import CHANGEABLE, LENGTH, is_among

# What may change in a run, but for its length.
INCIDENTAL_CONFIG = tuple(name for name in CHANGEABLE if name not in LENGTH)
INCIDENTAL_FACTS = ("world_size", "zero_stage", "created", "versions", "version")
_MAX_WIDTH = 40  # characters of a value in a table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A config key or fact that differs; counts: whether it makes the two unequal."""

    key: str
    a: Any
    b: Any
    counts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that differs, in float64 with L2 norms:

        max_abs   max |A - B|
        relative  |A - B| / max(|A|, |B|)

    Where a value that differs is not finite, relative is nan, and max_abs is nan or inf.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    num_values: int
    num_different: int
    max_abs: float
    relative: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All differences of two.

    different: the largest relative difference first. other_shape: (name, A's shape, B's shape).
    """

    a: str
    b: str
    equal: bool
    config: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    slots: tuple[str, ...]
    num_identical: int
    different: tuple[TensorDifference, ...]
    other_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]


def compare(a: Contents, b: Contents, *, all_slots: bool = False) -> Comparison:
    """Compare two, with one tensor of each in memory at a time.

    all_slots: also the optimizer's state and the averages, where both have them. If one is an
    export, which has only [model] and a few facts, only what both have is compared.
    """
    slots = tuple(slot for slot in a.slots if slot in b.slots and (all_slots or slot == "fp32"))
    shapes_a = a.shapes | (a.statistics if all_slots else {})
    shapes_b = b.shapes | (b.statistics if all_slots else {})
    names = [name for name in shapes_a if shapes_a[name] == shapes_b.get(name)]
    different, num_identical = _compare_tensors(a, b, slots, names)
    other_shape = tuple(
        (name, shapes_a[name], shapes_b[name])
        for name in shapes_a
        if name in shapes_b and shapes_a[name] != shapes_b[name]
    )
    only_in_a = tuple(name for name in shapes_a if name not in shapes_b)
    only_in_b = tuple(name for name in shapes_b if name not in shapes_a)
    has_export = a.is_export or b.is_export
    config = tuple(_differing(a.config, b.config, INCIDENTAL_CONFIG, shared_alone=has_export))
    facts = tuple(_differing(a.facts, b.facts, INCIDENTAL_FACTS, shared_alone=has_export))
    same_experiment = not any(difference.counts for difference in (*config, *facts))
    return Comparison(
        a=a.path,
        b=b.path,
        equal=same_experiment and not (different or other_shape or only_in_a or only_in_b),
        config=config,
        facts=facts,
        slots=slots,
        num_identical=num_identical,
        different=different,
        other_shape=other_shape,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
    )


def compare_tensors(name: str, slot: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """The difference of two tensors of one shape, in float64; None if there is none.

    A NaN equals a NaN, and an infinity the same infinity.
    """
    if not a.numel() or (a.dtype == b.dtype and torch.equal(a, b)):
        return None
    num_different, max_abs, delta_squares, a_squares, b_squares = 0, 0.0, 0.0, 0.0, 0.0
    for left, right in zip(chunks(a), chunks(b), strict=True):
        delta = left - right
        if not math.isfinite(float(delta.dot(delta))):  # NaN - NaN and inf - inf are NaN
            delta[(left == right) | (left.isnan() & right.isnan())] = 0.0
        num_different += int(delta.count_nonzero())
        largest = float(delta.abs().max())
        max_abs = largest if math.isnan(largest) else max(max_abs, largest)
        delta_squares += float(delta.dot(delta))
        a_squares, b_squares = a_squares + float(left.dot(left)), b_squares + float(right.dot(right))
    if not num_different:
        return None
    larger = max(a_squares, b_squares)
    return TensorDifference(
        name=name,
        slot=slot,
        shape=tuple(a.shape),
        num_values=a.numel(),
        num_different=num_different,
        max_abs=max_abs,
        relative=math.sqrt(delta_squares / larger) if larger else math.nan,
    )


def render(comparison: Comparison) -> str:
    """The text of `tools/checkpoint.py diff`."""
    lines = [f"A  {comparison.a}", f"B  {comparison.b}"]
    for counts, title in ((True, "that differ"), (False, "that may differ")):
        for section, differences in (("config", comparison.config), ("facts", comparison.facts)):
            rows = [(d.key, _value_text(d.a), _value_text(d.b)) for d in differences if d.counts is counts]
            if rows:
                lines += ["", *table((f"{section} {title}", "A", "B"), rows, left=(0, 1, 2))]
    for title, names in (("only in A", comparison.only_in_a), ("only in B", comparison.only_in_b)):
        if names:
            lines += ["", f"{title}: {len(names):,} tensors", *(f"  {name}" for name in names)]
    if comparison.other_shape:
        rows = [(name, shape_text(a), shape_text(b)) for name, a, b in comparison.other_shape]
        lines += ["", *table(("tensors of other shapes", "A", "B"), rows, left=(0, 1, 2))]
    if comparison.different:
        lines += ["", *_tensor_table(comparison)]
    counts_text = f"{comparison.num_identical:,} tensors are identical, {len(comparison.different):,} differ"
    lines += ["", f"{', '.join(comparison.slots)}: {counts_text}"]
    return "\n".join([*lines, "equal" if comparison.equal else "different"])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values of a nested dict."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _compare_tensors(
    a: Contents, b: Contents, slots: Sequence[str], names: Sequence[str]
) -> tuple[tuple[TensorDifference, ...], int]:
    """The tensors that differ, by falling relative difference, and how many are identical."""
    pairs = [
        (slot, name)
        for slot in slots
        for name in names
        if slot == "fp32" or (a.has(name, slot) and b.has(name, slot))
    ]
    bar = tqdm(pairs, unit="tensor", desc="comparing", leave=False, disable=None)
    outcomes = [compare_tensors(name, slot, a.tensor(name, slot), b.tensor(name, slot)) for slot, name in bar]
    different = sorted((outcome for outcome in outcomes if outcome), key=_falling)
    return tuple(different), len(pairs) - len(different)


def _falling(difference: TensorDifference) -> float:
    """A sort key that puts nan first, then the largest."""
    return -math.inf if math.isnan(difference.relative) else -difference.relative


def _tensor_table(comparison: Comparison) -> list[str]:
    rows = [
        (
            diff.name if len(comparison.slots) == 1 else f"{diff.slot}/{diff.name}",
            shape_text(diff.shape),
            f"{diff.num_different:,} of {diff.num_values:,}",
            f"{diff.max_abs:.4g}",
            f"{diff.relative:.4g}",
        )
        for diff in comparison.different
    ]
    header = ("tensor", "shape", "values that differ", "max |A-B|", "relative")
    return table(header, rows, left=(0, 1))


def _value_text(value: Any) -> str:
    """A value in a table, without its middle if it is long."""
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    text = f"{value:,}" if type(value) is int else text
    if len(text) <= _MAX_WIDTH:
        return text
    return f"{text[: _MAX_WIDTH // 2 - 2]}...{text[-_MAX_WIDTH // 2 + 1 :]}"


def _differing(
    a: Mapping[str, Any], b: Mapping[str, Any], incidental: Sequence[str], *, shared_alone: bool
) -> Iterator[Difference]:
    """The dotted keys at which two nested dicts differ.

    incidental: keys and sections that do not count. shared_alone: leave out top-level keys that
    only one of the two has.
    """
    keys = [key for key in {**a, **b} if not shared_alone or (key in a and key in b)]
    left, right = (dict(flatten({key: values[key] for key in keys if key in values})) for values in (a, b))
    for key in {**left, **right}:
        if left.get(key) != right.get(key):
            yield Difference(key=key, a=left.get(key), b=right.get(key), counts=not is_among(key, incidental))
