"""Lists the checkpoints of a run: how far training was at each, and whether each is intact."""

import bisect
import contextlib
import dataclasses
import datetime
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.verify import Verdict, check_all, committed, places_of
from vitscale.errors import CheckpointError
from vitscale.metrics.rows import each_row
from vitscale.metrics.writer import FILE_NAME, is_score
from vitscale.quantities import size_text
from vitscale.report.contents import facts_of
from vitscale.report.text import damaged_newest, table, when
from vitscale.stores import storage

WIDTH = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """One checkpoint.

    status: "verified", "not verified" (only sizes were compared) or "DAMAGED", with a problem.
    facts: of its manifest; empty if that is unreadable. metrics: the last train/loss logged up
    to its step (at loss_step, 0 if there is none), and the evaluations at its step.
    """

    path: str
    step: int
    latest: bool
    status: str
    problem: str
    num_bytes: int
    facts: dict[str, Any]
    metrics: dict[str, float]
    loss_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunListing:
    """The checkpoints of a run by rising step. notes: sentences about what else is there."""

    places: tuple[str, ...]
    checkpoints: tuple[CheckpointRow, ...]
    notes: tuple[str, ...]


def list_run(run: str, *, checksums: bool = True) -> RunListing:
    """The checkpoints of a run, given its directory or its URL in a store.

    checksums: False only compares the sizes of files. Raises CheckpointError if there is none.
    """
    if storage.is_local(run) and (Path(run) / MANIFEST).is_file():
        raise CheckpointError(
            f"{run} is one checkpoint, but list takes a run directory; use show for a checkpoint"
        )
    places = places_of(run)
    latest = [storage.child(place, name) for place in places if (name := _latest(place))]
    checked = _checked(run, checksums=checksums)
    if not checked:
        raise CheckpointError(
            f"{run} holds no checkpoints: there are no step-* folders in {' or '.join(places)}"
        )
    by_step = metrics_at(_metrics_rows(run), [step for step, _, _ in checked])
    checkpoints = []
    for step, folder, verdict in checked:
        metrics, loss_step = by_step[step]
        status = "verified" if checksums else "not verified"
        manifest = verdict.manifest
        row = CheckpointRow(
            path=folder,
            step=step,
            latest=folder in latest,
            status="DAMAGED" if verdict.problem else status,
            problem=verdict.problem,
            num_bytes=manifest.num_bytes if manifest else 0,
            facts=facts_of(manifest) if manifest else {},
            metrics=metrics,
            loss_step=loss_step,
        )
        checkpoints.append(row)
    notes = [*_misnamed(latest, [(row.step, row.path) for row in checkpoints]), *_unfinished(places)]
    return RunListing(places=tuple(places), checkpoints=tuple(checkpoints), notes=tuple(notes))


def check_newest(listing: RunListing) -> None:
    """Raise CheckpointError if the newest checkpoint is damaged, in every place that has it."""
    newest = [row for row in listing.checkpoints if row.step == listing.checkpoints[-1].step]
    if all(row.problem for row in newest):
        good = [row.step for row in listing.checkpoints if not row.problem]
        raise CheckpointError(damaged_newest(newest[-1].step, good[-1] if good else None))


def metrics_at(
    rows: Iterable[Mapping[str, Any]], steps: Iterable[int]
) -> dict[int, tuple[dict[str, float], int]]:
    """By step, the last train/loss logged up to it and the evaluations at it, and the step of
    that loss, 0 if there is none.
    """
    steps = sorted(set(steps))
    losses: dict[int, tuple[float, int]] = {}  # by step: the last after the step before it
    evaluations: dict[int, dict[str, float]] = {step: {} for step in steps}
    for row in rows:
        place = bisect.bisect_left(steps, row["step"])
        if "train/loss" in row and place < len(steps):
            losses[steps[place]] = row["train/loss"], row["step"]
        if row["step"] in evaluations:
            evaluations[row["step"]] |= {k: value for k, value in row.items() if k.startswith("eval/")}
    metrics, last = {}, None
    for step in steps:
        last = losses.get(step, last)
        loss = {"train/loss": last[0]} if last else {}
        metrics[step] = {**loss, **evaluations[step]}, last[1] if last else 0
    return metrics


def render(listing: RunListing, now: datetime.datetime) -> str:
    """The text of `tools/checkpoint.py list`."""
    header = ("step", "samples", "saved", "age", "size", "ranks", "ZeRO", "precision", "state")
    lines = table(header, [_cells(row, now) for row in listing.checkpoints], left=(7, 8))
    start = max(map(len, lines)) + 2
    text = [*listing.places, "", f"{lines[0]:<{start}}metrics"]
    for row, line in zip(listing.checkpoints, lines[1:], strict=True):
        text += _beside(line, start, _metric_texts(row))
    sentences = [f"step {row.step:,}: {row.problem}" for row in listing.checkpoints if row.problem]
    sentences += listing.notes
    return "\n".join([*text, "", *sentences] if sentences else text)


def _metrics_rows(run: str) -> Iterable[Mapping[str, Any]]:
    path = Path(storage.local_path(run)) / FILE_NAME
    return each_row(path) if storage.is_local(run) and path.is_file() else ()


def _checked(run: str, *, checksums: bool) -> list[tuple[int, str, Verdict]]:
    """(step, folder, verdict) of the checkpoints; without those that were deleted meanwhile.

    If all were, it checks those that have taken their place.
    """
    still, checked = committed(run), []
    while still and not checked:
        steps = still
        verdicts = check_all([folder for _, folder in steps], checksums=checksums)
        still = committed(run) if any(verdict.problem for verdict in verdicts) else steps
        pairs = zip(steps, verdicts, strict=True)
        checked = [(*place, verdict) for place, verdict in pairs if place in still]
    return checked


def _latest(place: str) -> str:
    """What the file "latest" says; "" if there is none."""
    try:
        return storage.read_bytes(storage.child(place, store.LATEST)).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _misnamed(latest: Sequence[str], steps: Sequence[tuple[int, str]]) -> Iterator[str]:
    newest_step, newest_folder = steps[-1]
    newest = {folder for step, folder in steps if step == newest_step}  # in both places of a run
    if latest and not newest & set(latest):
        yield (
            f'the file "latest" names {latest[0].rpartition("/")[2]}, but the newest here is '
            f"{newest_folder.rpartition('/')[2]}: a resume takes the newest that verifies"
        )


def _unfinished(places: Sequence[str]) -> Iterator[str]:
    for folder in (Path(place) for place in places if storage.is_local(place)):
        for path in sorted(folder.glob(f"{store.TEMPORARY}*")):
            files: list[str] = []
            with contextlib.suppress(FileNotFoundError):  # it is committed meanwhile
                files.extend(str(file) for file in path.rglob("*.*"))
            if not path.exists():
                continue
            sizes = storage.sizes(files)  # None: deleted meanwhile
            yield (
                f"{path.name} ({size_text(sum(size or 0 for size in sizes))}) is a save in progress or the "
                "remains of a killed one: the next start of the run removes it"
            )


def _cells(row: CheckpointRow, now: datetime.datetime) -> tuple[str, ...]:
    state = f"{row.status}, latest" if row.latest else row.status
    if not row.facts:
        return (f"{row.step:,}", *[""] * 7, state)
    return (
        f"{row.step:,}",
        f"{row.facts['samples_seen']:,}",
        *when(row.facts["created"], now),
        size_text(row.num_bytes),
        str(row.facts["world_size"]),
        str(row.facts["zero_stage"]),
        row.facts["precision"],
        state,
    )


def _metric_texts(row: CheckpointRow) -> Iterator[str]:
    for name, value in row.metrics.items():
        if name == "train/loss":
            text = f"loss {value:.4f}"
            yield text if row.loss_step == row.step else f"{text} (step {row.loss_step:,})"
        elif is_score(name):
            yield f"{name.removeprefix('eval/')} {value:.4g}"


def _beside(line: str, start: int, texts: Iterator[str]) -> list[str]:
    """A line with texts to its right, from column `start` on, wrapped at 120 columns."""
    # textwrap breaks lines at blanks, and must not do so inside a text.
    joined = ", ".join(text.replace(" ", "\0") for text in texts)
    wrapped = textwrap.wrap(joined, max(30, WIDTH - start), break_long_words=False, break_on_hyphens=False)
    first, *others = [text.replace("\0", " ") for text in wrapped] or [""]
    return [f"{line:<{start}}{first}".rstrip(), *(f"{'':<{start}}{text}" for text in others)]
