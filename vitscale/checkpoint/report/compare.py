"""Two checkpoints or exports side by side: which tensors differ, and by how much; config and facts.

Equal are two that hold the same weights, at the same point of the same experiment. Where it ran, how fast,
how often it saved, and the ranks that wrote it may differ: those differences are told, and do not count.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitscale.checkpoint.report.show import Opened, chunks, shape_text, table

INCIDENTAL_CONFIG = ("run_dir", "engine", "log", "checkpoint", "evals")
INCIDENTAL_FACTS = ("world_size", "zero_stage", "created", "versions")
_LONGEST = 40  # characters of a value in a table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A config key or fact that differs; counts: whether it makes the two unequal."""

    key: str
    a: Any
    b: Any
    counts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that differs: max_abs = max |A - B|, relative = |A - B| / max(|A|, |B|) in L2 norms; nan where
    a value is not finite in one of the two and another in the other.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    num_values: int
    num_different: int
    max_abs: float
    relative: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All differences of two. different: by falling relative difference. other_shape: (name, A's, B's)."""

    a: str
    b: str
    equal: bool
    config: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    states: tuple[str, ...]
    num_identical: int
    different: tuple[TensorDifference, ...]
    other_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]


def compare(a: Opened, b: Opened, *, all_states: bool = False) -> Comparison:
    """Compare two, one tensor of each in memory at a time.

    all_states: also those of the optimizer, and averages, that both have. Beside an export, which has the
    model section alone and few facts, only what both have is compared.
    """
    names = [name for name in a.shapes if a.shapes[name] == b.shapes.get(name)]
    other_shape = tuple(
        (name, a.shapes[name], b.shapes[name])
        for name in a.shapes
        if name in b.shapes and a.shapes[name] != b.shapes[name]
    )
    states = tuple(state for state in a.states if state in b.states and (all_states or state == "fp32"))
    pairs = [
        (state, name)
        for state in states
        for name in names
        if state == "fp32" or name not in a.fixed | b.fixed  # what is fixed has no other state
    ]
    bar = tqdm(pairs, unit="tensor", desc="comparing", leave=False, disable=None)
    found = [compare_tensors(name, state, a.read(name, state), b.read(name, state)) for state, name in bar]
    different = sorted((one for one in found if one), key=_falling)
    only_in_a = tuple(name for name in a.shapes if name not in b.shapes)
    only_in_b = tuple(name for name in b.shapes if name not in a.shapes)
    exported = a.is_export or b.is_export
    config = tuple(_differing(a.config, b.config, INCIDENTAL_CONFIG, shared_alone=exported))
    facts = tuple(_differing(a.facts, b.facts, INCIDENTAL_FACTS, shared_alone=exported))
    counting = [one for one in (*config, *facts) if one.counts]
    return Comparison(
        a=a.path,
        b=b.path,
        equal=not (counting or different or other_shape or only_in_a or only_in_b),
        config=config,
        facts=facts,
        states=states,
        num_identical=len(found) - len(different),
        different=tuple(different),
        other_shape=other_shape,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
    )


def compare_tensors(name: str, state: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """The difference of two tensors of one shape, in float64; None where every value is the same, a NaN as a
    NaN.
    """
    if not a.numel() or (a.dtype == b.dtype and torch.equal(a, b)):
        return None
    count, max_abs, delta_squares, a_squares, b_squares = 0, 0.0, 0.0, 0.0, 0.0
    for left, right in zip(chunks(a), chunks(b), strict=True):
        delta = left - right
        if not math.isfinite(float(delta.dot(delta))):  # a NaN is the same as a NaN, inf as inf
            delta[(left == right) | (left.isnan() & right.isnan())] = 0.0
        count += int(delta.count_nonzero())
        largest = float(delta.abs().max())
        max_abs = largest if math.isnan(largest) else max(max_abs, largest)
        delta_squares += float(delta.dot(delta))
        a_squares, b_squares = a_squares + float(left.dot(left)), b_squares + float(right.dot(right))
    if not count:
        return None
    larger = max(a_squares, b_squares)
    return TensorDifference(
        name=name,
        state=state,
        shape=tuple(a.shape),
        num_values=a.numel(),
        num_different=count,
        max_abs=max_abs,
        relative=math.sqrt(delta_squares / larger) if larger else math.nan,
    )


def render(comparison: Comparison) -> str:
    """The text of `tools/checkpoint.py diff`."""
    one = comparison
    lines = [f"A  {one.a}", f"B  {one.b}"]
    for counts, title in ((True, "that differ"), (False, "that may differ")):
        for header, differences in (("config", one.config), ("facts", one.facts)):
            rows = [(d.key, _text(d.a), _text(d.b)) for d in differences if d.counts is counts]
            if rows:
                lines += ["", *table((f"{header} {title}", "A", "B"), rows, left=(0, 1, 2))]
    for title, names in (("only in A", one.only_in_a), ("only in B", one.only_in_b)):
        lines += ["", f"{title}: {len(names):,} tensors", *(f"  {name}" for name in names)] if names else []
    if one.other_shape:
        rows = [(name, shape_text(a), shape_text(b)) for name, a, b in one.other_shape]
        lines += ["", *table(("tensors of other shapes", "A", "B"), rows, left=(0, 1, 2))]
    if one.different:
        lines += ["", *_tensor_table(one)]
    num_different = len(one.different)
    lines += [
        "",
        f"{', '.join(one.states)}: {one.num_identical:,} tensors are identical, {num_different:,} differ",
    ]
    return "\n".join([*lines, "equal" if one.equal else "different"])


def _tensor_table(comparison: Comparison) -> list[str]:
    rows = [
        (
            one.name if len(comparison.states) == 1 else f"{one.state}/{one.name}",
            shape_text(one.shape),
            f"{one.num_different:,} of {one.num_values:,}",
            f"{one.max_abs:.4g}",
            f"{one.relative:.4g}",
        )
        for one in comparison.different
    ]
    header = ("tensor", "shape", "values that differ", "max |A-B|", "relative")
    return table(header, rows, left=(0, 1))


def _text(value: Any) -> str:
    """A value in a table: its middle is left out where it is long."""
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    text = f"{value:,}" if type(value) is int else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 2]}...{text[-_LONGEST // 2 + 1 :]}"


def _falling(one: TensorDifference) -> float:
    return -math.inf if math.isnan(one.relative) else -one.relative


def _differing(
    a: Mapping[str, Any], b: Mapping[str, Any], incidental: Sequence[str], *, shared_alone: bool
) -> Iterator[Difference]:
    """The dotted keys at which two nested dicts differ; shared_alone: below top-level keys that both have."""
    keys = [key for key in {**a, **b} if not shared_alone or (key in a and key in b)]
    left = dict(_flat({key: a[key] for key in keys if key in a}))
    right = dict(_flat({key: b[key] for key in keys if key in b}))
    for key in {**left, **right}:
        if left.get(key) != right.get(key):
            counts = key.partition(".")[0] not in incidental
            yield Difference(key=key, a=left.get(key), b=right.get(key), counts=counts)


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value
