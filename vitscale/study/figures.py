"""The plots of a study, each beside the paper's: accuracy by compute, and by data."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from vitscale.errors import ConfigError
from vitscale.inspection.figures import colours, new_figure, save
from vitscale.models.resnet import ResNetConfig
from vitscale.study.cells import Cell
from vitscale.study.config import StudyConfig
from vitscale.study.paper import AVERAGE5, FIGURE3, TABLE6
from vitscale.study.points import Point, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RGBA = tuple[float, float, float, float]
MARKERS = {"ViT": "o", "ResNet": "s", "Hybrid": "P"}


def draw(study: StudyConfig, cells: Sequence[Cell], out: Path) -> list[Path]:
    """The plots of what is done, as PNGs in a folder. Raises ConfigError if nothing is."""
    found = points(study, cells)
    if not found:
        raise ConfigError(f"{study.out} holds no finished run; do one: python tools/study.py run STUDY.toml")
    families = {cell.model.name: family(cell) for cell in cells}
    plots = {
        "by_compute.png": draw_compute(largest(found), families, study.metric, ["imagenet"]),
        "by_data.png": draw_data(found, study.metric),
    }
    if averages := points(study, cells, AVERAGE5):
        plots["by_compute_average5.png"] = draw_compute(largest(averages), families, "Average-5", AVERAGE5)
    for name, plot in plots.items():
        save(plot, out / name)
    return [out / name for name in plots]


def largest(found: Sequence[Point]) -> list[Point]:
    """Of each model the point with the most data: less of it is another question."""
    best: dict[str, Point] = {}
    for point in found:
        held = best.setdefault(point.model.name, point)
        if point.num_images > held.num_images:
            best[point.model.name] = point
    return list(best.values())


def draw_compute(
    found: Sequence[Point], families: Mapping[str, str], metric: str, recipes: Sequence[str]
) -> "Figure":
    """The metric by the FLOPs of pretraining: a mark for each model (Figure 5), or series (8).

    families: of our models, by name: a key of MARKERS. recipes: whose means are the paper's
    points.
    """
    figure, ours, paper = _pair()
    if lines := series(found):
        _draw_lines(ours, lines, _shades(lines))
        for point in found:
            _annotate(ours, point.exaflops, point.mean, point.model.name)
    else:
        _scatter(
            ours, [(families[p.model.name], p.exaflops, p.mean, p.deviation, p.model.name) for p in found]
        )
    rows = [
        (row.family, float(row.exaflops), fmean(row.accuracy[name] for name in recipes) / 100, 0.0, model)
        for model, row in TABLE6.items()
    ]
    _scatter(paper, rows)
    ours.set_title(f"here: {metric}", fontsize="medium")
    of = "ImageNet" if len(recipes) == 1 else f"mean of {len(recipes)} data sets,"
    paper.set_title(f"paper, Table 6: {of} top-1 after fine-tuning", fontsize="medium")
    for axes in (ours, paper):
        _log_x(axes, "pretraining compute (exaFLOPs)")
    return figure


def series(found: Sequence[Point]) -> dict[str, list[tuple[float, float, float]]]:
    """(exaFLOPs, mean, deviation) of the models of each series, by rising compute.

    A model without one is a series of its own; empty if no model has any.
    """
    if not any(point.model.series for point in found):
        return {}
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in found:
        for name in point.model.series or (point.model.name,):
            lines.setdefault(name, []).append((point.exaflops, point.mean, point.deviation))
    return {name: sorted(places) for name, places in lines.items()}


def draw_data(found: Sequence[Point], metric: str) -> "Figure":
    """Figures 3 and 4: the metric by the images of the pretraining data, one line a model."""
    figure, ours, paper = _pair()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in found:
        places = lines.setdefault(point.model.resolved_line, [])
        places.append((float(point.num_images), point.mean, point.deviation))
    papers = {name: [(float(n), v / 100, 0.0) for n, v in row.items()] for name, row in FIGURE3.items()}
    # A line of both panels has one colour; if there is none, each panel has the whole range.
    both = {**papers, **lines} if papers.keys() & lines.keys() else {}
    _draw_lines(ours, {name: sorted(places) for name, places in lines.items()}, _shades(both or lines))
    _draw_lines(paper, papers, _shades(both or papers))
    ours.set_title(f"here: {metric}", fontsize="medium")
    paper.set_title("paper, Figure 3: ImageNet top-1 after fine-tuning", fontsize="medium")
    for axes in (ours, paper):
        _log_x(axes, "images of the pretraining data")
    return figure


def family(cell: Cell) -> str:
    """Of a run's model: a key of MARKERS."""
    if isinstance(cell.config.model, ResNetConfig):
        return "ResNet"
    return "ViT" if cell.config.model.kind == "vit" else "Hybrid"


def _pair() -> "tuple[Figure, Axes, Axes]":
    """A figure with room for our points, left, and for the paper's."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(11.0, 4.6)
    ours, paper = figure.subplots(1, 2)
    for axes in (ours, paper):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    ours.set_ylabel("accuracy")
    return figure, ours, paper


def _log_x(axes: "Axes", label: str) -> None:
    """Name and scale x, once the points are drawn.

    On a scale that is logarithmic before, matplotlib leaves a lone x out of the limits.
    """
    axes.set_xlabel(label)
    axes.set_xscale("log")


def _scatter(axes: "Axes", marks: Iterable[tuple[str, float, float, float, str]]) -> None:
    """marks: (family, x, y, deviation, name)."""
    by_family: dict[str, list[tuple[float, float, float, str]]] = {}
    for kind, *mark in marks:
        by_family.setdefault(kind, []).append(mark)  # pyright: ignore[reportArgumentType] (a list of four)
    shades = _shades(MARKERS)
    for kind, found in sorted(by_family.items()):
        xs, ys, deviations, names = zip(*found, strict=True)
        axes.errorbar(
            xs, ys, deviations, fmt=MARKERS[kind], color=shades[kind], label=kind, capsize=2, markersize=7
        )
        for x, y, name in zip(xs, ys, names, strict=True):
            # Hybrids lie close to ViTs: their names stand on the other side.
            _annotate(axes, x, y, name, on_left=kind == "Hybrid")
    if by_family:
        axes.legend(frameon=False, fontsize="small", loc="best")


def _annotate(axes: "Axes", x: float, y: float, name: str, *, on_left: bool = False) -> None:
    side, align = (-6, "right") if on_left else (6, "left")
    axes.annotate(name, (x, y), (side, 3), textcoords="offset points", fontsize=6, color="0.35", ha=align)


def _draw_lines(
    axes: "Axes",
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    shades: Mapping[str, RGBA],
) -> None:
    """lines: (x, y, deviation) of each, x rising."""
    for name, places in lines.items():
        xs, ys, deviations = zip(*places, strict=True)
        axes.errorbar(xs, ys, deviations, fmt="o-", color=shades[name], label=name, capsize=2, markersize=5)
    if lines:
        axes.legend(frameon=False, fontsize="small", loc="best")


def _shades(names: Collection[str]) -> dict[str, RGBA]:
    return dict(zip(names, colours(len(names)), strict=True))
