"""Charts as inline SVG, from values to markup: lines over steps, and a bar in parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from vitscale.metrics.expect import Band
from vitscale.report.page.html import Html, element, joined
from vitscale.report.page.scale import Scale, percent, short, thinned

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 370, 10, 192  # of the plot, in the chart
MAX_DOTS = 40  # a line of up to so many points shows each of them
NUM_STYLES = 9  # classes of colours in style.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A line: values at rising steps. style: its colour. faint: drawn behind the others."""

    label: str
    steps: Float64[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]
    style: int = 0
    faint: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    until: int = 0,
    bands: Sequence[Band] = (),
    marks: Mapping[int, str] | None = None,
    is_fraction: bool = False,
    may_log: bool = False,
) -> Html:
    """A figure with lines over steps.

    until: steps go from 0 to there, at least. bands: of expected values, shaded. marks: texts
    of steps that get a vertical line. is_fraction: label values as percentages. may_log: as in
    Scale.fit.
    """
    rows = [np.array(band, dtype=np.float64).reshape(-1, 3) for band in bands]
    ends = [until, *(line.steps[-1] for line in series if len(line.steps)), *(row[-1, 0] for row in rows)]
    edges = [np.concatenate([row[:, 1], row[:, 2]]) for row in rows]
    all_values = np.concatenate([np.empty(0), *(line.values for line in series), *edges])
    x = Scale.fit(np.array([0.0, max(ends)]), LEFT, RIGHT, margin=0.02)
    y = Scale.fit(all_values, BOTTOM, TOP, may_log=may_log)
    form = percent if is_fraction else short
    content = [
        element("title", _summary(title, series, form)),
        *_axes(x, y, form),
        *(_band(row, x, y) for row in rows),
        *(_mark(step, text, x) for step, text in (marks or {}).items() if x.low <= step <= x.high),
        *(_line(line, x, y) for line in sorted(series, key=lambda line: not line.faint)),
    ]
    picture = element(
        "svg",
        *content,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
        data_x=f"{x.low!r} {x.high!r} {LEFT} {RIGHT}",
        data_y=f"{y.low!r} {y.high!r} {BOTTOM} {TOP} {int(y.log)} {int(is_fraction)}",
    )
    scale = element("small", " log scale") if y.log else ""
    return element("figure", element("figcaption", title, scale), picture)


def stacked_bar(title: str, parts: Mapping[str, float]) -> Html:
    """A bar whose parts are fractions of 1, with a legend; parts of 0 are left out."""
    shown = {name: part for name, part in parts.items() if part > 0}
    left, bars, legend = 0.0, [], []
    for style, (name, part) in enumerate(shown.items()):
        label = f"{name} {100 * part:.1f}%"
        rect = element("rect", element("title", label), x=WIDTH * left, y=0, width=WIDTH * part, height=22)
        bars.append(element("g", rect, class_=f"fill{style % NUM_STYLES}"))
        legend.append(element("li", swatch(style, filled=True), label))
        left += part
    words = ", ".join(f"{name} {part:.1%}" for name, part in shown.items())
    content = [element("title", f"{title}: {words}"), *bars]
    bar = element(
        "svg", *content, viewBox=f"0 0 {WIDTH} 22", role="img", preserveAspectRatio="none", class_="bar"
    )
    return element("figure", element("figcaption", title), bar, element("ul", *legend, class_="legend"))


def legend(labels: Sequence[str]) -> Html:
    """Which line is whose."""
    items = (element("li", swatch(style), label) for style, label in enumerate(labels))
    return element("ul", *items, class_="legend")


def swatch(style: int, *, filled: bool = False) -> Html:
    """A sample of a line's or a bar's colour."""
    name = style % NUM_STYLES
    shape = (
        element("rect", width=14, height=10, class_=f"fill{name}")
        if filled
        else element("path", d="M0 5H22", class_=f"line line{name}")
    )
    width = 14 if filled else 22
    box = f"0 0 {width} 10"
    return element("svg", shape, viewBox=box, width=width, height=10, class_="swatch", aria_hidden="true")


def _summary(title: str, series: Sequence[Series], form: Callable[[float], str]) -> str:
    """What a chart says, in words: for those who do not see it."""
    texts = []
    for line in series:
        if not len(line.steps):
            continue
        ends = f"{form(line.values[0])} at step {line.steps[0]:,.0f}, {form(line.values[-1])} at step "
        texts.append(f"{line.label}: {ends}{line.steps[-1]:,.0f}")
    return f"{title}. {'; '.join(texts) or 'No values'}"


def _axes(x: Scale, y: Scale, form: Callable[[float], str]) -> list[Html]:
    parts = []
    for value in y.ticks(5):
        at = y.at(value)
        parts.append(element("path", d=f"M{LEFT} {at:.1f}H{RIGHT}", class_="grid"))
        parts.append(element("text", form(value), x=LEFT - 5, y=at + 3.5, class_="left"))
    for value in x.ticks(5):
        if value == int(value) and value >= 0:
            parts.append(element("text", short(value), x=x.at(value), y=BOTTOM + 14, class_="below"))
    parts.append(element("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}", class_="axis"))
    parts.append(element("text", "step", x=RIGHT, y=HEIGHT - 2, class_="left"))
    return parts


def _band(rows: Float64[np.ndarray, "n 3"], x: Scale, y: Scale) -> Html:
    steps, low, high = x(rows[:, 0]), y(rows[:, 1]), y(rows[:, 2])
    if len(rows) == 1:  # a band of one step is as wide as a line
        steps, low, high = np.array([steps[0] - 1.5, steps[0] + 1.5]), low.repeat(2), high.repeat(2)
    outline = zip([*steps, *steps[::-1]], [*high, *low[::-1]], strict=True)
    points = " ".join(f"{at:.1f},{value:.1f}" for at, value in outline)
    return element("polygon", element("title", "expected"), points=points, class_="band")


def _mark(step: int, text: str, x: Scale) -> Html:
    title = element("title", text)
    return element("path", title, d=f"M{x.at(step):.1f} {TOP}V{BOTTOM}", class_="mark")


def _line(line: Series, x: Scale, y: Scale) -> Html:
    """The path of a line, broken where values are not finite: these get a cross at the top."""
    steps, values = thinned(line.steps, line.values, RIGHT - LEFT)
    style = f"line line{line.style % NUM_STYLES}" + " faint" * line.faint
    points = list(zip(x(steps).tolist(), y(values).tolist(), strict=True))
    commands, is_open = [], False
    for at, value in points:
        if value == value:  # not nan
            commands.append(f"{'L' if is_open else 'M'}{at:.1f} {value:.4f}")  # the script reads values back
        is_open = value == value
    path = element("path", d="".join(commands), class_=style, data_label=line.label)
    dots = [
        element("circle", cx=at, cy=value, r=2.2, class_=f"fill{line.style % NUM_STYLES}")
        for at, value in points
        if value == value and (len(points) <= MAX_DOTS or len(commands) == 1) and not line.faint
    ]
    crosses = [
        element(
            "path", element("title", "not finite"), d=f"M{at - 3:.1f} {TOP}l6 6m0 -6l-6 6", class_="cross"
        )
        for at, value in points
        if value != value
    ]
    return element("g", path, joined(dots), joined(crosses))
