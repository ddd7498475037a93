"""The paper's figures of a trained ViT; needs matplotlib, of the extra plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale.errors import ConfigError
from vitscale.inspection.mosaics import GAP, lit, tiled
from vitscale.inspection.weights import Components
from vitscale.system import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 200


def draw_filters(components: Components) -> "Figure":
    """Figure 7, left: principal components of the embedding filters, from the top left on."""
    count = len(components.filters)
    cols = min(7, count)
    rows = math.ceil(count / cols)
    figure = new_figure(cols, rows + 0.4)
    axes = figure.subplots(rows, cols, squeeze=False).flatten()
    for place in axes:
        place.set_axis_off()
    for place, filters in zip(axes, components.filters.numpy(), strict=False):
        place.imshow(0.5 + filters / (2 * np.abs(filters).max()), interpolation="nearest")
    total = 100 * components.shares.sum().item()
    figure.suptitle(f"RGB embedding filters: {count} principal components, {total:.0f}% of the variance")
    return figure


def draw_positions(similarity: Float[Tensor, "h w h w"]) -> "Figure":
    """Figure 7, centre: for each patch, the similarity of its position to those of all."""
    rows, cols = similarity.shape[:2]
    figure = new_figure(6, 5 * rows / cols)
    axes = figure.subplots()
    tiles = tiled(similarity, gap=math.nan)[:-GAP, :-GAP]
    shown = axes.imshow(tiles.numpy(), vmin=-1, vmax=1, cmap="viridis")
    for axis, count in ((axes.xaxis, cols), (axes.yaxis, rows)):
        numbers = np.arange(count)
        axis.set_ticks((count - 1) / 2 + (count + GAP) * numbers, map(str, numbers + 1))
    axes.tick_params(length=0, labelsize=min(10, 200 / max(rows, cols)))
    axes.spines[:].set_visible(False)
    axes.set_title("Position embedding similarity")
    axes.set_xlabel("input patch column")
    axes.set_ylabel("input patch row")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    return figure


def draw_distances(distances: Sequence[Float[Tensor, " K"]], uniform: float) -> "Figure":
    """Figure 7, right: the mean attention distance of each head, by layer.

    distances: of each layer, in pixels. uniform: that of attention to all patches alike.
    """
    figure = new_figure(5.0, 4.0)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    heads = len(distances[0])
    shades = colours(heads)
    for head in range(heads):
        layers = range(1, len(distances) + 1)
        values = [of_layer[head].item() for of_layer in distances]
        label = f"head {head + 1}" if head < 3 else "..." if head == 3 else None
        axes.scatter(layers, values, s=14, color=shades[head], label=label)
    axes.axhline(uniform, color="0.6", linewidth=1, linestyle="--", label="uniform attention")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("network depth (layer)")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.update_datalim([(1, 0)])  # so that the margin above the dots is a share of the height from 0
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def draw_maps(images: UInt8[Tensor, "B 3 H W"], maps: Float[Tensor, "B h w"]) -> "Figure":
    """Figures 6 and 14: each image, and beside it the same weighted by attention."""
    pairs_in_row = 1 if len(images) < 4 else 2 if len(images) < 24 else 4
    rows = math.ceil(len(images) / pairs_in_row)
    figure = new_figure(3 * pairs_in_row, 1.5 * rows)
    axes = figure.subplots(rows, 2 * pairs_in_row, squeeze=False).flatten()
    for place in axes:
        place.set_axis_off()
    for number, pair in enumerate(zip(images, lit(images, maps), strict=True)):
        for place, pixels in zip(axes[2 * number :], pair, strict=False):
            place.imshow(pixels.permute(1, 2, 0).numpy())
    for place in axes[: 2 * min(pairs_in_row, len(images)) : 2]:
        place.set_title("input", fontsize="small")
    for place in axes[1 : 2 * min(pairs_in_row, len(images)) : 2]:
        place.set_title("attention", fontsize="small")
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib; install it: bash tools/setup.sh plots") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", out: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with atomic.appearing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def colours(count: int) -> list[tuple[float, float, float, float]]:
    """So many that differ as much as they can, RGBA."""
    from matplotlib import colormaps

    return [colormaps["viridis"](number / max(1, count - 1)) for number in range(count)]
