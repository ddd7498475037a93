"""What the plots of a study show: every point, and a family alike beside the paper's."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from vitscale.study.config import StudyModel
from vitscale.study.figures import draw_compute, draw_data
from vitscale.study.paper import AVERAGE5
from vitscale.study.points import Point


def point(name: str, num_images: int, exaflops: float, line: str = "", series: tuple[str, ...] = ()) -> Point:
    model = StudyModel(name=name, config="unused.toml", line=line, series=series)
    return Point(model=model, swept=(), values=(0.25, 0.75), num_images=num_images, exaflops=exaflops)


@pytest.mark.parametrize(("images", "exaflops"), [(10_000, 2.1e-11), (303_000_000, 55.0)])
def test_every_point_lies_within_its_axes(images: int, exaflops: float) -> None:
    a, b = (point(name, images, exaflops) for name in "ab")
    for found in ([a], [a, b]):
        for figure in (
            draw_compute(found, {"a": "ViT", "b": "Hybrid"}, "m", ["imagenet"]),
            draw_data(found, "m"),
        ):
            for axes in figure.axes:
                left, right = axes.get_xlim()
                xs = [x for line in axes.lines for x in np.asarray(line.get_xdata())]
                assert xs and all(1.01 * left < x < right / 1.01 for x in xs)


def colours_of(axes: Axes) -> dict[str, tuple[float, ...]]:
    """Of what the legend names."""
    marks, labels = axes.get_legend_handles_labels()
    return {label: to_rgba(mark.lines[0].get_color()) for mark, label in zip(marks, labels, strict=True)}


@pytest.mark.parametrize("family", ["ViT", "ResNet", "Hybrid"])
def test_a_family_has_one_colour_in_both_panels(family: str) -> None:
    ours, paper = map(colours_of, draw_compute([point("a", 9, 1.0)], {"a": family}, "m", ["imagenet"]).axes)
    assert len(set(paper.values())) == 3 and ours == {family: paper[family]}


def test_series_are_lines_by_rising_compute_and_a_model_of_several_is_on_each() -> None:
    named = {"base": (2.0, ("depth", "width")), "deep": (8.0, ("depth",)), "flat": (1.0, ("depth",))}
    named |= {"wide": (4.0, ("width",)), "other": (3.0, ())}
    found = [point(name, 9, exaflops, series=series) for name, (exaflops, series) in named.items()]
    ours, paper = draw_compute(found, dict.fromkeys(named, "ViT"), "m", ["imagenet"]).axes
    marks, labels = ours.get_legend_handles_labels()
    lines = {label: mark.lines[0] for mark, label in zip(marks, labels, strict=True)}
    assert {label: list(line.get_xdata()) for label, line in lines.items()} == {
        "depth": [1.0, 2.0, 8.0],
        "width": [2.0, 4.0],
        "other": [3.0],
    }
    assert {line.get_linestyle() for line in lines.values()} == {"-"}
    assert len(set(colours_of(ours).values())) == 3 and len(colours_of(paper)) == 3
    assert sorted(text.get_text() for text in ours.texts) == sorted(named)
    plain, _ = draw_compute([point("a", 9, 1.0)], {"a": "ViT"}, "m", ["imagenet"]).axes
    assert {line.get_linestyle() for line in plain.lines} == {"None"}


def test_a_line_has_one_colour_in_both_panels_and_lines_of_one_panel_differ() -> None:
    found = [point("a", 9, 1.0, "ViT-L/16"), point("b", 9, 1.0)]
    for shared, points in ((["ViT-L/16"], found), ([], found[1:])):
        ours, paper = map(colours_of, draw_data(points, "m").axes)
        assert (
            [name for name in ours if name in paper] == shared == [n for n in ours if ours[n] == paper.get(n)]
        )
        assert len(set(ours.values())) == len(ours) and len(set(paper.values())) == len(paper) == 5


def test_the_papers_panel_of_the_data_has_the_rows_of_its_figure_3() -> None:
    _, paper = draw_data([point("a", 9, 1.0)], "m").axes
    marks, labels = paper.get_legend_handles_labels()
    lines = {label: mark.lines[0] for mark, label in zip(marks, labels, strict=True)}
    assert list(lines["ViT-B/32"].get_ydata()) == [0.7338, 0.8128, 0.8073]


def test_the_papers_panel_of_average_5_has_the_means_of_five() -> None:
    _, paper = draw_compute([point("a", 9, 1.0)], {"a": "ViT"}, "Average-5", AVERAGE5).axes
    marks = {text.get_text(): float(text.xy[1]) for text in paper.texts}
    assert marks["R50x1 7"] == pytest.approx(0.8933) and marks["R152x2 7"] == pytest.approx(0.9401, abs=1e-4)
    low, high = paper.get_ylim()
    assert len(marks) == 18 and all(low < y < high for y in marks.values())
