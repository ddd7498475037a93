"""Charts as functions: where values lie, which are labelled and drawn, and what is written."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from vitscale.report.page.chart import LEFT, RIGHT, Series, line_chart, stacked_bar
from vitscale.report.page.html import Html
from vitscale.report.page.scale import Scale, form, linear_ticks, percent, short, thinned


def scale(*values: float, may_log: bool = False) -> Scale:
    return Scale.fit(np.array(values), 100, 0, margin=0.0, may_log=may_log)


def test_a_scale_maps_its_ends_to_the_pixels_and_clips_what_is_outside() -> None:
    fitted = scale(2.0, 4.0)
    assert fitted(np.array([2.0, 3.0, 4.0, 9.0, -9.0])).tolist() == [100, 50, 0, 0, 100]
    assert math.isnan(fitted.at(math.nan))


def test_a_margin_stays_free_at_both_ends() -> None:
    fitted = Scale.fit(np.array([0.0, 10.0]), 0, 100, margin=0.1)
    assert (fitted.low, fitted.high) == (-1, 11)


def test_a_log_scale_needs_values_above_0_that_differ_much() -> None:
    fitted = scale(1.0, 1e4, may_log=True)
    assert fitted.log and fitted.at(100.0) == pytest.approx(50)
    assert fitted.ticks(5) == pytest.approx([1, 10, 100, 1e3, 1e4])
    assert not scale(1.0, 50.0, may_log=True).log
    assert not scale(0.0, 1e4, may_log=True).log
    assert not scale(1.0, 1e4).log


@pytest.mark.parametrize(
    "values",
    [
        [],
        [math.nan, math.inf],
        [3.0],
        [0.0, 0.0],
        [1e-320, 2e-320],
        [-1e308, 1e308],
        [1e-300, 1e300],
        [1e15, 1e15 + 1],
    ],
)
@pytest.mark.parametrize("may_log", [False, True])
def test_any_values_have_a_scale_with_finite_ticks(values: list[float], may_log: bool) -> None:
    fitted = Scale.fit(np.array(values, dtype=np.float64), 100, 0, may_log=may_log)
    assert fitted.low < fitted.high
    assert all(0 <= fitted.at(value) <= 100 for value in values if math.isfinite(value))
    assert fitted.ticks(5) and all(fitted.low <= tick <= fitted.high for tick in fitted.ticks(5))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.03, 0.41, [0.1, 0.2, 0.3, 0.4]),
        (0.0, 600.0, [0, 200, 400, 600]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (2e-4, 9e-4, [2e-4, 4e-4, 6e-4, 8e-4]),
    ],
)
def test_ticks_are_round_numbers_within_the_scale(low: float, high: float, expected: list[float]) -> None:
    assert linear_ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.25, "0.25"), (1600.0, "1600"), (12_000.0, "12k"), (1.5e6, "1.5M"), (3e9, "3G"),
        (5e-4, "0.0005"), (3e-5, "3e-5"), (-2e14, "-2e14"), (math.nan, "nan"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_fractions_are_percentages() -> None:
    assert [percent(value) for value in (0.0, 0.523, 1.0, math.nan)] == ["0%", "52.3%", "100%", "nan"]
    names = ("eval/a/top1", "time/data_wait_fraction", "eval/a/loss", "eval/a/learning_rate", "eval/a/c")
    assert [form(name)(0.1) for name in names] == ["10%", "10%", "0.1", "0.1", "0.1"]


def test_thinning_keeps_every_spike_and_the_places_that_are_not_finite() -> None:
    xs = np.arange(100_000, dtype=np.float64)
    ys = np.sin(xs / 5000)
    ys[[777, 54_321]] = 50.0, -50.0
    ys[90_000] = math.inf
    thin_xs, thin_ys = thinned(xs, ys, 300)
    assert len(thin_xs) <= 2 * 300 + 1 and (np.diff(thin_xs) > 0).all()
    kept = dict(zip(thin_xs.tolist(), thin_ys.tolist(), strict=True))
    assert kept[777] == 50.0 and kept[54_321] == -50.0 and math.isnan(kept[90_000])
    assert all(ys[int(x)] == y for x, y in kept.items() if not math.isnan(y))
    # The extremes of each column are those of all of its points.
    first = ys[xs < xs[-1] / 300]
    assert {first.min(), first.max()} == set(thin_ys[thin_xs < xs[-1] / 300].tolist())


def test_a_short_line_is_not_thinned() -> None:
    xs = np.arange(7.0)
    assert [part.tolist() for part in thinned(xs, xs**2, 4)] == [xs.tolist(), (xs**2).tolist()]


def chart(*values: float, **options: object) -> ElementTree.Element:
    line = Series(
        label="run", steps=np.arange(len(values), dtype=np.float64), values=np.array(values, dtype=np.float64)
    )
    return ElementTree.fromstring(line_chart("Loss", [line], **options))


def paths(figure: ElementTree.Element) -> str:
    (path,) = figure.findall(".//path[@data-label='run']")
    return path.attrib["d"]


def test_a_line_is_broken_where_values_are_not_finite_and_they_are_marked() -> None:
    figure = chart(1.0, 2.0, math.nan, 3.0, math.inf, 2.0)
    assert re.sub(r"[\d. ]", "", paths(figure)) == "MLMM"
    assert len(figure.findall(".//path[@class='cross']")) == 2
    assert len(figure.findall(".//circle")) == 4


def test_points_lie_between_the_edges_of_the_plot_from_left_to_right() -> None:
    xs = [float(point.split()[0]) for point in re.split("[ML]", paths(chart(*range(50))))[1:]]
    assert xs == sorted(xs) and LEFT <= xs[0] < xs[-1] <= RIGHT


@pytest.mark.parametrize("values", [[], [2.5], [2.0, 2.0, 2.0], [math.nan, math.nan]])
def test_what_is_no_curve_is_drawn_all_the_same(values: list[float]) -> None:
    figure = chart(*values)
    assert "nan" not in paths(figure) and "inf" not in paths(figure)
    assert len(figure.findall(".//circle")) == sum(map(math.isfinite, values))


def test_a_chart_says_in_words_what_it_shows() -> None:
    title = chart(3.0, 2.0, 0.25).find(".//svg/title")
    assert title is not None and title.text == "Loss. run: 3 at step 0, 0.25 at step 2"


def test_the_band_widens_the_chart_and_starts_are_marked_within_it() -> None:
    figure = chart(1.0, 1.0, bands=[((0, 0.5, 1.5), (10, 0.0, 4.0))], marks={5: "start 2", 99: "start 3"})
    (band,) = figure.findall(".//polygon")
    points = [tuple(map(float, point.split(","))) for point in band.attrib["points"].split()]
    assert len(points) == 4 and len({x for x, _ in points}) == 2
    assert points[0][1] < points[3][1]  # the upper edge comes first, and is higher up
    (mark,) = figure.findall(".//path[@class='mark']")
    assert mark[0].text == "start 2"


def test_a_band_of_one_step_has_a_width() -> None:
    (band,) = chart(1.0, 1.0, bands=[((1, 0.5, 1.5),)]).findall(".//polygon")
    assert len({point.split(",")[0] for point in band.attrib["points"].split()}) == 2


def test_the_parts_of_a_bar_follow_one_another_and_those_of_0_are_left_out() -> None:
    figure = stacked_bar("Time", {"steps": 0.75, "idle": 0.0, "data": 0.25})
    rects = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)" height="22"', figure)
    assert [tuple(map(float, rect)) for rect in rects] == [(0, 285), (285, 95)]
    assert isinstance(figure, Html) and "idle" not in figure
