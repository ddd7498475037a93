"""The accuracies on VTAB-1k beside the paper's: as text, Markdown, JSON and a chart."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from vitscale.vtab.published import TABLE_9
from vitscale.vtab.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = ("natural", "specialized", "structured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies by task, one for each seed, as fractions of 1.

    deviations: sentences on what is not the protocol, or not the published data; () = none.
    """

    checkpoint: str
    protocol: str
    accuracies: Mapping[str, Sequence[float]]
    deviations: tuple[str, ...] = ()

    def mean(self, group: str = "") -> float:
        """Over the tasks of a group that were done; "" = over all of them, not over groups."""
        return mean_of({name: fmean(values) for name, values in self.accuracies.items()}, group)

    def deviation(self) -> float:
        """Of the mean over all tasks, from seed to seed (population)."""
        return pstdev([fmean(values) for values in zip(*self.accuracies.values(), strict=True)])

    def to_json(self) -> dict[str, Any]:
        tasks = {
            name: {
                "group": TASKS[name].group,
                "mean": fmean(values),
                "std": pstdev(values),
                "accuracies": list(values),
            }
            for name, values in self.accuracies.items()
        }
        groups = {group: self.mean(group) for group in GROUPS if self._has(group)}
        return {
            "checkpoint": self.checkpoint,
            "protocol": self.protocol,
            "not_the_protocol": list(self.deviations),
            "tasks": tasks,
            "groups": groups,
            "mean": self.mean(),
            "std": self.deviation(),
            "num_tasks": len(tasks),
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """(task, accuracy, the paper's three), group by group, in percent.

        The paper's means are over the same tasks.
        """
        paper = [{name: row[name] for name in self.accuracies} for row in TABLE_9.values()]
        for group in filter(self._has, GROUPS):
            for name, values in self.accuracies.items():
                if TASKS[name].group == group:
                    own = _percent(fmean(values), pstdev(values) if len(values) > 1 else None)
                    yield name, own, *(f"{row[name]:.1f}" for row in TABLE_9.values())
            published = (f"{mean_of(row, group):.2f}" for row in paper)
            yield f"mean of {group}", _percent(self.mean(group)), *published
        number = len(self.accuracies)
        name = "mean of all 19" if number == len(TASKS) else f"mean of these {number}, not of all 19"
        several = len(next(iter(self.accuracies.values()))) > 1
        own = _percent(self.mean(), self.deviation() if several else None)
        yield name, own, *(f"{mean_of(row):.2f}" for row in paper)

    def _label(self) -> str:
        return f"this model ({self.protocol})"

    def _has(self, group: str) -> bool:
        return any(TASKS[name].group == group for name in self.accuracies)

    def text(self) -> str:
        from vitscale.report.text import table

        header = ("task", self._label(), *TABLE_9)
        lines = [self.checkpoint, "", *table(header, list(self.rows()), left=(0,))]
        return "\n".join([*lines, *self._notes()])

    def markdown(self) -> str:
        header = ("task", self._label(), *TABLE_9)
        lines = [f"`{self.checkpoint}`", "", *map(_markdown_row, (header, ["---"] * len(header)))]
        lines += map(_markdown_row, self.rows())
        return "\n".join([*lines, *self._notes()]) + "\n"

    def _notes(self) -> list[str]:
        return (
            ["", *(f"Not the protocol: {sentence}" for sentence in self.deviations)]
            if self.deviations
            else []
        )

    def draw(self, path: Path) -> None:
        """Write a PNG of bars, beside the paper's. Raises ImportError without matplotlib."""
        self.figure().savefig(path, dpi=150)

    def figure(self) -> "Figure":
        """Bars beside the paper's: left the means of its Figure 2, right the tasks."""
        from matplotlib.figure import Figure

        names = [name for group in GROUPS for name in self.accuracies if TASKS[name].group == group]
        groups = ["", *filter(self._has, GROUPS)]
        labels = [f"mean of {group or len(names)}" for group in groups]
        rows = {self._label(): {name: 100 * fmean(self.accuracies[name]) for name in names}, **TABLE_9}
        tasks = {model: {name: row[name] for name in names} for model, row in rows.items()}
        means = {
            model: {label: mean_of(row, group) for label, group in zip(labels, groups, strict=True)}
            for model, row in tasks.items()
        }
        widths = [len(groups), len(names)]
        figure = Figure(figsize=(max(8.0, 0.75 * sum(widths)), 4.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
        for axes, series in zip(panels, (means, tasks), strict=True):
            _draw_bars(axes, series)
        panels[0].set_ylim(0, 100)
        panels[0].set_ylabel("top-1 accuracy, %")
        figure.suptitle("VTAB-1k" + (" (not the protocol)" if self.deviations else ""))
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, ncols=len(rows), loc="outside lower center")
        return figure


def _draw_bars(axes: "Axes", series: Mapping[str, Mapping[str, float]]) -> None:
    """series: the values of each model, by the same names, in percent."""
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        positions = [number + (place - (len(series) - 1) / 2) * width for number in range(len(values))]
        axes.bar(positions, list(values.values()), width, label=label)
        axes.set_xticks(range(len(values)), list(values), rotation=45, ha="right")
        axes.set_xlim(-0.6, len(values) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)


def mean_of(accuracies: Mapping[str, float], group: str = "") -> float:
    """Over the tasks of a group; "" = over all of them, as VTAB's score is defined."""
    return fmean(value for name, value in accuracies.items() if not group or TASKS[name].group == group)


def _percent(value: float, deviation: float | None = None) -> str:
    text = f"{100 * value:.2f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.2f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
