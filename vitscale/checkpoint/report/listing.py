"""The checkpoints of a run in a table: which there are, how training went until each, if each is whole."""

import dataclasses
import datetime
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale import storage
from vitscale.checkpoint import store
from vitscale.checkpoint.format import MANIFEST, CheckpointError
from vitscale.checkpoint.report.show import facts_of, size_text, table, when
from vitscale.checkpoint.verify import Checked, check_all, committed, places_of
from vitscale.metrics import FILE_NAME, read_metrics

WIDTH = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint. state: "verified", "not verified" (its sizes alone) or "DAMAGED", with the problem.
    facts: of its manifest; empty where that is unreadable. metrics: the last train/loss logged up to its step
    (at loss_step; 0: none) and the evaluations at its step.
    """

    path: str
    step: int
    latest: bool
    state: str
    problem: str
    num_bytes: int
    facts: dict[str, Any]
    metrics: dict[str, float]
    loss_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The checkpoints of a run by rising step; notes: sentences on what else lies there."""

    places: tuple[str, ...]
    checkpoints: tuple[Listed, ...]
    notes: tuple[str, ...]


def list_run(run: str, *, checksums: bool = True) -> Listing:
    """The checkpoints of a run, given by its directory or its URL in a store.

    checksums: False compares the sizes of the files alone. Raises CheckpointError where there is none.
    """
    if storage.is_local(run) and (Path(run) / MANIFEST).is_file():
        raise CheckpointError(f"{run} is one checkpoint, list takes a run directory; use show for this one")
    places, steps = places_of(run), committed(run)
    if not steps:
        raise CheckpointError(
            f"{run} holds no checkpoints: there are no step-* folders in {' or '.join(places)}"
        )
    rows = _metrics_rows(run)
    latest = [storage.child(place, name) for place in places if (name := _latest(place))]
    checked = check_all([folder for _, folder in steps], checksums=checksums)
    state = "verified" if checksums else "not verified"
    listed = [
        _listed(step, one, state, metrics_at(rows, step), one.folder in latest)
        for (step, _), one in zip(steps, checked, strict=True)
    ]
    notes = [*_misnamed(latest, steps), *_unfinished(places)]
    return Listing(places=tuple(places), checkpoints=tuple(listed), notes=tuple(notes))


def metrics_at(rows: Sequence[Mapping[str, Any]], step: int) -> tuple[dict[str, float], int]:
    """The last train/loss logged up to `step`, with the evaluations at it; and the step of that loss, 0 if
    there is none.
    """
    found, loss_step = {}, 0
    for row in rows:
        if row["step"] <= step and "train/loss" in row:
            found["train/loss"], loss_step = row["train/loss"], row["step"]
    for row in rows:
        if row["step"] == step:
            found |= {name: value for name, value in row.items() if name.startswith("eval/")}
    return found, loss_step


def render(listing: Listing, now: datetime.datetime) -> str:
    """The text of `tools/checkpoint.py list`."""
    header = ("step", "samples", "saved", "age", "size", "ranks", "ZeRO", "precision", "state")
    lines = table(header, [_cells(one, now) for one in listing.checkpoints], left=(7, 8))
    start = max(map(len, lines)) + 2
    lines = [f"{lines[0]:<{start}}metrics", *lines[1:]]
    lines = [*listing.places, "", lines[0]] + [
        line
        for one, row in zip(listing.checkpoints, lines[1:], strict=True)
        for line in _beside(row, start, _metric_texts(one))
    ]
    after = [f"step {one.step:,}: {one.problem}" for one in listing.checkpoints if one.problem]
    after += listing.notes
    return "\n".join([*lines, *([""] if after else []), *after])


def _listed(
    step: int, one: Checked, state: str, metrics: tuple[dict[str, float], int], latest: bool
) -> Listed:
    return Listed(
        path=one.folder,
        step=step,
        latest=latest,
        state="DAMAGED" if one.problem else state,
        problem=one.problem,
        num_bytes=one.manifest.num_bytes if one.manifest else 0,
        facts=facts_of(one.manifest) if one.manifest else {},
        metrics=metrics[0],
        loss_step=metrics[1],
    )


def _metrics_rows(run: str) -> list[dict[str, Any]]:
    path = Path(storage.local_path(run)) / FILE_NAME
    return read_metrics(path) if storage.is_local(run) and path.is_file() else []


def _latest(place: str) -> str:
    """What the file "latest" says; "" where there is none."""
    try:
        return storage.read_bytes(storage.child(place, store.LATEST)).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _misnamed(latest: Sequence[str], steps: Sequence[tuple[int, str]]) -> Iterator[str]:
    newest = {folder for step, folder in steps if step == steps[-1][0]}
    if latest and not newest & {*latest}:
        yield (
            f'the file "latest" names {latest[0].rpartition("/")[2]}, the newest here is '
            f"{steps[-1][1].rpartition('/')[2]}: a resume takes the newest that verifies"
        )


def _unfinished(places: Sequence[str]) -> Iterator[str]:
    for folder in (Path(place) for place in places if storage.is_local(place)):
        for path in sorted(folder.glob(f"{store.TEMPORARY}*")):
            sizes = storage.sizes([str(file) for file in path.rglob("*.*")])  # None: gone by now
            yield (
                f"{path.name} ({size_text(sum(size or 0 for size in sizes))}) is a save under way, or what a "
                "killed one left: the next start of the run removes it"
            )


def _cells(one: Listed, now: datetime.datetime) -> tuple[str, ...]:
    state = one.state + ", latest" * one.latest
    if not one.facts:
        return (f"{one.step:,}", *[""] * 7, state)
    return (
        f"{one.step:,}",
        f"{one.facts['samples_seen']:,}",
        *when(one.facts["created"], now),
        size_text(one.num_bytes),
        str(one.facts["world_size"]),
        str(one.facts["zero_stage"]),
        one.facts["precision"],
        state,
    )


def _metric_texts(one: Listed) -> Iterator[str]:
    for name, value in one.metrics.items():
        if name == "train/loss":
            yield f"loss {value:.4f}" + f" (step {one.loss_step:,})" * (one.loss_step != one.step)
        elif not name.endswith("/num_samples"):
            yield f"{name.removeprefix('eval/')} {value:.4g}"


def _beside(row: str, start: int, texts: Iterator[str]) -> list[str]:
    """A row with texts to its right from column `start`, on as many lines as 120 columns make of them."""
    # the blanks inside a text must not break it
    joined = ", ".join(text.replace(" ", "\0") for text in texts)
    wrapped = textwrap.wrap(joined, max(30, WIDTH - start), break_long_words=False, break_on_hyphens=False)
    lines = [text.replace("\0", " ") for text in wrapped] or [""]
    return [f"{row if number == 0 else '':<{start}}{text}".rstrip() for number, text in enumerate(lines)]
