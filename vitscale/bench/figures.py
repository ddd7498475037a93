"""The paper's Figure 12, of what `tools/bench.py inference` measured."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitscale.inspection.figures import colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"vit": "o", "resnet": "s", "hybrid": "P"}
PANELS = {"peak, images/s": "peak inference speed (images/s)", "largest batch": "largest batch that fits"}


def draw_inference(figure: "Figure", results: Mapping[str, Any]) -> None:
    """Left the peak of the images/s by image size, right the largest batch; a line a model.

    results: of the bench.
    """
    rows = [row for row in results.values() if isinstance(row, dict)]
    sizes = sorted({row["config"]["image_size"] for row in rows})
    # Of two that are close, like 504 px of patches of 14 beside 512, the larger is named.
    larger = [*sizes[1:], math.inf]
    named = [size for size, above in zip(sizes, larger, strict=True) if above > 1.15 * size]
    models = dict.fromkeys(row["model"] for row in rows)
    shades = dict(zip(models, colours(len(models)), strict=True))
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for model in models:
            of_model = [row for row in rows if row["model"] == model and key in row]
            places = sorted((row["config"]["image_size"], row[key]) for row in of_model)
            if places:
                marker = MARKERS[of_model[0]["config"]["kind"]]
                axes.plot(*zip(*places, strict=True), f"{marker}-", color=shades[model], label=model)
        _finish(axes, label, named)


def _finish(axes: "Axes", label: str, sizes: Sequence[int]) -> None:
    """Scale and name the axes, once the points are drawn: before, a lone one gets no limits."""
    axes.set_title(label, fontsize="medium")
    axes.set_xlabel("image size (pixels)")
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "measured on a GPU alone", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    axes.grid(color="0.92", linewidth=0.8)
    axes.legend(frameon=False, fontsize="small")
