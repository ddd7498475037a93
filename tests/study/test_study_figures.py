"""What the plots of a study show: every point, and a family alike beside the paper's."""

import pytest

from vitscale.study.config import StudyModel
from vitscale.study.figures import draw_compute, draw_data
from vitscale.study.points import Point


def point(name: str, num_images: int, exaflops: float, line: str = "") -> Point:
    model = StudyModel(name=name, config="unused.toml", line=line)
    return Point(model=model, swept=(), values=(0.25, 0.75), num_images=num_images, exaflops=exaflops)


@pytest.mark.parametrize(("images", "exaflops"), [(10_000, 2.1e-11), (303_000_000, 55.0)])
def test_every_point_lies_within_its_axes(images: int, exaflops: float) -> None:
    a, b = (point(name, images, exaflops) for name in "ab")
    for found in ([a], [a, b]):
        for figure in (draw_compute(found, {"a": "ViT", "b": "Hybrid"}, "m"), draw_data(found, "m")):
            for axes in figure.axes:
                left, right = axes.get_xlim()
                xs = [x for line in axes.lines for x in line.get_xdata()]
                assert xs and all(1.01 * left < x < right / 1.01 for x in xs)
