"""Curves of one run or of several over one another, and the tables of evaluations."""

import dataclasses
from collections.abc import Mapping, Sequence

from vitscale.metrics.expect import Band
from vitscale.metrics.writer import best_step
from vitscale.report.page.chart import Series, legend, line_chart
from vitscale.report.page.html import Html, details, element, joined, note, table
from vitscale.report.page.overview import scores
from vitscale.report.page.records import Column, Record
from vitscale.report.page.scale import form, percent

SHOWN_EVALUATIONS = 12  # rows of the table that is open
MAX_EVALUATIONS = 1000  # rows in all
# Metrics with charts: name, title, whether it is a fraction, whether the scale may be log.
OPTIMIZATION = (
    ("train/grad_norm", "Gradient norm, before clipping", False, True),
    ("train/lr", "Learning rate", False, False),
    ("train/skipped_steps", "Skipped steps, so far", False, False),
    ("data/bad_samples", "Samples replaced, so far", False, False),
)
SPEED = (
    ("perf/images_per_second", "Images per second", False, False),
    ("perf/mfu", "MFU", True, False),
    ("time/data_wait_fraction", "Time waiting for data", True, False),
    ("perf/memory_gib", "Memory of rank 0, GiB", False, False),
    ("perf/slowest_ratio", "Slowest rank, times the median", False, False),
    ("checkpoint/blocked_seconds", "Seconds that a save stopped training", False, False),
)
COUNTS = ("train/skipped_steps", "data/bad_samples")  # without a chart where they stay 0


def curves(records: Sequence[Record]) -> Html:
    """Loss, accuracies, gradient norm and learning rate."""
    charts = [_loss(records), *(_evaluation(records, name) for name in _all_scores(records))]
    charts += _charts(records, OPTIMIZATION)
    names = legend([record.name for record in records]) if len(records) > 1 else Html()
    lines = "Vertical lines: starts after the first. " if _marks(records) else ""
    expects = any(record.verdicts for record in records)
    bands = "Shaded: what the config expects. " if expects else ""
    has_means = any("train/loss_mean" in record.columns for record in records)
    thin = "Thin: the loss of single steps. Bold: the mean since the row before. " if has_means else ""
    return joined([names, note(f"{thin}{bands}{lines}".strip()), element("div", *charts, class_="charts")])


def speed(records: Sequence[Record]) -> Html:
    """Throughput, waiting for data, and memory; empty if no run has logged any of them."""
    charts = _charts(records, SPEED)
    names = legend([record.name for record in records]) if len(records) > 1 else Html()
    return joined([names, element("div", *charts, class_="charts")]) if charts else Html()


def expectations(records: Sequence[Record]) -> Html:
    """What the configs expect and what came of it; empty if they expect nothing."""
    parts = []
    for record in records:
        expect = record.config.expect if record.config else None
        if not expect or not record.verdicts:
            continue
        rows = []
        for name, verdict in record.verdicts.items():
            if verdict is None:
                rows.append([name, "no value within the steps of its band", "", "", ""])
                continue
            text = form(name)
            good = element("span", str(verdict), class_=f"state {'good' if verdict.on_track else 'bad'}")
            between = f"{text(verdict.low)} to {text(verdict.high)}"
            rows.append([name, good, text(verdict.value), between, f"{verdict.step:,}"])
        caption = "What was expected, and what came"
        caption += f": {record.name}" if len(records) > 1 else ""
        header = ["metric", "verdict", "last value", "expected there", "step"]
        parts.append(table(header, rows, caption=caption, right=(2, 3, 4)))
        parts.append(note(f"Source of the bands: {expect.source}."))
    return joined(parts)


def evaluations(record: Record) -> Html:
    """Every result of every evaluation, and the first, the best and the last of each."""
    names = scores(record)
    if not names:
        return note("No evaluation has been logged.")
    columns = [record.columns[name] for name in names]
    rows = []
    for name, column in zip(names, columns, strict=True):
        text, steps = form(name), column.steps.astype(int).tolist()
        by_step = dict(zip(steps, column.values.tolist(), strict=True))
        best = best_step(by_step, name)
        rows.append(
            [
                name.removeprefix("eval/"),
                text(column.first),
                "" if best is None else f"{text(by_step[best])} at step {best:,}",
                f"{text(column.last)} at step {steps[-1]:,}",
            ]
        )
    header = ["result", "first", "best", "last"]
    summary = table(header, rows, caption="First, best and last", right=(1, 2, 3))
    return joined([summary, _step_by_step(names, columns)])


def _step_by_step(names: Sequence[str], columns: Sequence[Column]) -> Html:
    cells: dict[int, dict[str, str]] = {}
    for name, column in zip(names, columns, strict=True):
        for step, value in zip(column.steps.astype(int), column.values, strict=True):
            cells.setdefault(int(step), {})[name] = form(name)(float(value))
    steps = sorted(cells)[-MAX_EVALUATIONS:]
    rows = [[f"{step:,}", *(cells[step].get(name, "") for name in names)] for step in steps]
    header = ["step", *(name.removeprefix("eval/") for name in names)]
    caption = "Step by step" if len(steps) == len(cells) else f"The last {len(steps):,} steps"
    whole = table(header, rows, caption=caption, right=range(len(header)))
    return whole if len(rows) <= SHOWN_EVALUATIONS else details(f"All {len(rows):,} evaluated steps", whole)


def _charts(records: Sequence[Record], wanted: Sequence[tuple[str, str, bool, bool]]) -> list[Html]:
    """The charts of those metrics that a run has."""
    charts = []
    for name, title, is_fraction, may_log in wanted:
        lines = _lines(records, name)
        if not lines or (name in COUNTS and not any(line.values.any() for line in lines)):
            continue
        charts.append(_chart(title, records, lines, name, is_fraction=is_fraction, may_log=may_log))
    return charts


def _loss(records: Sequence[Record]) -> Html:
    """Each logged loss, and the means over the steps between the rows where they are logged."""
    raw, means = _lines(records, "train/loss"), _lines(records, "train/loss_mean")
    if means:
        raw = [dataclasses.replace(line, label=f"{line.label}, single steps", faint=True) for line in raw]
    name = "train/loss_mean" if _bands(records, "train/loss_mean") else "train/loss"
    return _chart("Training loss", records, [*raw, *means], name, may_log=True)


def _evaluation(records: Sequence[Record], name: str) -> Html:
    title, is_fraction = name.removeprefix("eval/"), form(name) is percent
    return _chart(title, records, _lines(records, name), name, is_fraction=is_fraction)


def _chart(
    title: str,
    records: Sequence[Record],
    lines: Sequence[Series],
    name: str,
    *,
    is_fraction: bool = False,
    may_log: bool = False,
) -> Html:
    """A chart of some lines, with the band of a metric. All charts have the same steps."""
    return line_chart(
        title,
        lines,
        until=max(record.last_step for record in records),
        bands=_bands(records, name),
        marks=_marks(records),
        is_fraction=is_fraction,
        may_log=may_log,
    )


def _lines(records: Sequence[Record], name: str) -> list[Series]:
    return [
        Series(label=record.name, steps=column.steps, values=column.values, style=style)
        for style, record in enumerate(records)
        if (column := record.columns.get(name))
    ]


def _bands(records: Sequence[Record], name: str) -> list[Band]:
    """The different bands that the runs' configs have for a metric."""
    bands = [record.config.expect.bands.get(name, ()) for record in records if record.config]
    return list(dict.fromkeys(band for band in bands if band))


def _all_scores(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in scores(record)))


def _marks(records: Sequence[Record]) -> Mapping[int, str]:
    """The starts after the first, of a single run: of several they would be too many lines."""
    if len(records) > 1:
        return {}
    return {
        int(row["step"]): f"start {number}, from step {row['step']:,}"
        for number, row in enumerate(records[0].starts, start=1)
        if number > 1 and row["step"] > 0
    }
