"""What a study has found: for each model and each fraction of the data, one point."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from vitscale.study.cells import Cell, Result, finetuned, number_of
from vitscale.study.config import StudyConfig, StudyModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one model on one fraction, with the best value of the sweep.

    values: the metric of each, a fraction of 1. num_images, exaflops: of one run.
    """

    model: StudyModel
    swept: tuple[str, ...]
    values: tuple[float, ...]
    num_images: int
    exaflops: float

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Of the population, 0 for one run."""
        return pstdev(self.values)


def points(study: StudyConfig, cells: Sequence[Cell], recipes: Sequence[str] = ()) -> list[Point]:
    """A point wherever all runs are done, and the fine-tunings that its values need.

    recipes: whose mean is the value; () = the metric of the study is.
    """
    found = []
    for group in groups(chosen(study, cells), with_swept=True):
        results = [(cell, result) for cell in group if (result := cell.result())]
        values = [value_of(study, cell, result, recipes) for cell, result in results]
        known = [value for value in values if value is not None]
        if len(known) == len(group):
            found.append(
                Point(
                    model=group[0].model,
                    swept=group[0].swept,
                    values=tuple(known),
                    num_images=results[0][1].num_images,
                    exaflops=results[0][1].exaflops,
                )
            )
    return found


def chosen(study: StudyConfig, cells: Sequence[Cell]) -> list[Cell]:
    """The runs with the best value of the sweep, by the mean over seeds, where all are done.

    A value that made a run diverge is not chosen.
    """
    return [cell for group in groups(cells, with_swept=False) for cell in _best(study, group)]


def value_of(study: StudyConfig, cell: Cell, result: Result, recipes: Sequence[str] = ()) -> float | None:
    """The metric of a finished run, or the mean over recipes.

    None before the fine-tunings that it needs are done.
    """
    kind, _, name = study.metric.partition("/")
    names = recipes or ([name] if kind == "finetune" else [])
    if not names:
        return number_of(cell, result, study.metric)
    means = [tuned["mean"] for name in names if (tuned := finetuned(cell, name))]
    return fmean(means) if len(means) == len(names) else None


def _best(study: StudyConfig, cells: Sequence[Cell]) -> Sequence[Cell]:
    if any(cell.result() is None and not cell.has_diverged() for cell in cells):
        return []
    sound = [group for group in groups(cells, with_swept=True) if all(cell.result() for cell in group)]
    if not sound or not study.sweep:
        return sound[0] if sound else []
    name = study.resolved_choose_by
    sign = -1 if name.endswith("loss") else 1

    def merit(group: Sequence[Cell]) -> float:
        mean = sign * fmean(_number(cell, name) for cell in group)
        return mean if math.isfinite(mean) else -math.inf  # max() may return a nan

    return max(sound, key=merit)


def groups(cells: Sequence[Cell], *, with_swept: bool) -> list[list[Cell]]:
    """Runs that differ in their seeds alone; or in the sweep, too."""
    found: dict[object, list[Cell]] = {}
    for cell in cells:
        key = cell.model.name, cell.fraction, cell.swept if with_swept else ()
        found.setdefault(key, []).append(cell)
    return list(found.values())


def _number(cell: Cell, name: str) -> float:
    result = cell.result()
    assert result, "its group is done"
    return number_of(cell, result, name)
