"""Does a study: trains its runs, chooses among the values of a sweep, and fine-tunes.

Whatever is done is not done again, a run that diverged included, and a run that was killed is
resumed, so the same command continues a study:

    OUT/MODEL/fraction-1/seed-0/config.toml     of a run
                               /run/            the run
                               /log             what its processes printed
                               /result.json     what came of it, written last
                               /finetune/NAME/  by a recipe, with a results.json
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from vitscale.checkpoint import store
from vitscale.errors import ConfigError, Diverged
from vitscale.finetune import grid
from vitscale.finetune.runs import keep_config, train
from vitscale.finetune.slots import PYTHON, Slots, in_slots
from vitscale.study.cells import Cell, cells, finetune_folder, slug, write_result
from vitscale.study.config import StudyConfig
from vitscale.study.points import chosen


def run(
    study: StudyConfig,
    *,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    count: int = 0,
    launcher: Sequence[str] = (),
    said: Callable[[str], object] = print,
) -> None:
    """Do what is left of a study, or of some of its models.

    only: names of models; none = all. overrides: KEY=VALUE for every run. count: processes at a
    time; 0 = one on each GPU. launcher: starts each training in place of a single process, like
    ["deepspeed", "--num_gpus", "8"]; then one run at a time. said: gets a line when a run is
    done. Raises ConfigError before anything is trained, UserError if a run failed, and Diverged
    once all else is done, where that leaves a model without a point.
    """
    todo = cells(study, only, overrides)
    for cell in todo:
        check_recipes(study, cell)
    for cell in todo:
        keep_config(cell.folder, cell.config)
    with Slots(1, 0) if launcher else Slots(count) as slots:
        actions = {
            str(cell.folder): functools.partial(_trained, cell, study, slots, launcher or PYTHON)
            for cell in todo
        }
        in_slots(actions, slots, said)
    counted, failed = chosen(study, todo), list[Diverged]()
    for cell in counted:
        for name, recipe in study.recipes_of(cell.model).items():
            folder = finetune_folder(cell, name)
            try:
                said(grid.run(_checkpoint(cell), recipe, folder, count=count, said=said).text())
            except Diverged as error:
                failed.append(error)
    _check_points(study, todo, counted)
    if failed:
        raise failed[0]


def check_recipes(study: StudyConfig, cell: Cell) -> None:
    """Raise ConfigError unless the model of a run can be fine-tuned by all of its recipes."""
    for recipe in study.recipes_of(cell.model).values():
        try:
            grid.values_for(grid.read(recipe)[0], cell.config.run_dir, cell.config.model)
        except ConfigError as error:
            raise ConfigError(f"{cell.model.name} cannot be fine-tuned by {recipe}: {error}") from None


def _trained(cell: Cell, study: StudyConfig, slots: Slots, launcher: Sequence[str]) -> list[float | None]:
    result = cell.result()
    if result is None:
        try:
            train(cell.folder, slots, launcher)
        except Diverged:
            return [None]
        result = write_result(cell, study)
    return [*result.numbers.values()]


def _check_points(study: StudyConfig, done: Sequence[Cell], counted: Sequence[Cell]) -> None:
    """Raise Diverged if no value of the sweep counts for some model and fraction."""
    found = {(cell.model.name, cell.fraction) for cell in counted}
    for cell in done:
        if (cell.model.name, cell.fraction) in found or not cell.has_diverged():
            continue
        others = ", as have runs by all other values of the sweep" if study.sweep else ""
        folder = Path(study.out) / slug(cell.model.name)
        way_out = f"lower optim.lr in {cell.model.config}, and delete {folder} or name another out"
        if "optim.lr" in study.sweep:
            way_out = "add a lower optim.lr to [sweep]"
        raise Diverged(f"{cell.folder}: the run has diverged{others}; {way_out}")


def _checkpoint(cell: Cell) -> str:
    """What is fine-tuned: the best checkpoint, where the run keeps it."""
    if not cell.config.checkpoint.keep_best:
        return cell.config.run_dir
    result = cell.result()
    assert result, "it is chosen, and so it is done"
    return str(store.step_directory(store.directory_of(cell.config.run_dir), result.step))
