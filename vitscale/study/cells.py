"""The runs of a study, before and after they are done."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale import toml
from vitscale.data.index import Index
from vitscale.data.split import share
from vitscale.errors import ConfigError
from vitscale.guard import ending
from vitscale.metrics.goodput import FILE_NAME as TIME_NAME
from vitscale.metrics.goodput import read_starts
from vitscale.metrics.rows import each_row, tail_start
from vitscale.metrics.writer import FILE_NAME, best_step
from vitscale.models.flops import train_flops
from vitscale.study.config import StudyConfig, StudyModel
from vitscale.system import atomic
from vitscale.train_config import TrainConfig

RESULT_NAME = "result.json"
_GIVEN = ("mean", "std")
_REMEDY = "delete it, and run again the command that wrote it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study, and its folder.

    swept: KEY=VALUE of the sweep. config: the whole config of the run.
    """

    model: StudyModel
    fraction: float
    seed: int
    swept: tuple[str, ...]
    folder: Path
    config: TrainConfig

    def result(self) -> "Result | None":
        """What came of the run; None before it has come to its end."""
        try:
            return atomic.read_json(self.folder / RESULT_NAME, lambda values: Result(**values), _REMEDY)
        except FileNotFoundError:
            return None

    def has_diverged(self) -> bool:
        """Whether the run ended without a result, because it diverged."""
        return self.result() is None and ending.has_diverged(self.config.run_dir)

    def last_step(self) -> int:
        """How far the run is, by its log."""
        path = Path(self.config.run_dir) / FILE_NAME
        if not path.is_file():
            return 0
        # Steps rise: the last is among the last rows.
        last_rows = each_row(path, start=tail_start(path, sys.maxsize))
        return max((row["step"] for row in last_rows), default=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a run.

    numbers: the logged ones that the study needs, fractions of 1. step: whose numbers and
    checkpoint they are; with checkpoint.keep_best not the last. num_images: of the part of the
    data set that it was trained on. exaflops: of the whole training. device_days: of all its
    starts, on as many devices as the last one.
    """

    numbers: dict[str, float]
    step: int
    num_images: int
    exaflops: float
    device_days: float


def cells(study: StudyConfig, only: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[Cell]:
    """The runs of a study, the models in its order. only: their names; none = all.

    Raises ConfigError for a name that no model has, and for a config that does not fit.
    """
    names = [model.name for model in study.models]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"the study has no model {unknown[0]!r}; it has {', '.join(names)}")
    chosen = [model for model in study.models if not only or model.name in only]
    return [cell for model in chosen for cell in _cells_of(study, model, overrides)]


def _cells_of(study: StudyConfig, model: StudyModel, overrides: Sequence[str]) -> Iterator[Cell]:
    values = [[(key, value) for value in values] for key, values in study.sweep.items()]
    for fraction, seed, swept in itertools.product(study.fractions, study.seeds, itertools.product(*values)):
        parts = [f"fraction-{fraction:g}", f"seed-{seed}", *(f"{key}-{_text(value)}" for key, value in swept)]
        folder = Path(study.out) / slug(model.name) / "/".join(map(slug, parts))
        own = [f"{key}={toml.value(value)}" for key, value in swept]
        if fraction < 1:
            own.append(f"data.fraction={fraction!r}")
        run_dir = f"run_dir={toml.value(str((folder / 'run').absolute()))}"
        words = [*model.overrides, *study.overrides, f"seed={seed}", *own, *overrides, run_dir]
        yield Cell(
            model=model,
            fraction=fraction,
            seed=seed,
            swept=tuple(f"{key}={_text(value)}" for key, value in swept),
            folder=folder,
            config=configs.load(TrainConfig, [model.config], words),
        )


def write_result(cell: Cell, study: StudyConfig) -> Result:
    """Read what a finished run logged, and keep it.

    Raises ConfigError for a number of the study that it did not log.
    """
    config = cell.config
    judge, world_size, rows = config.checkpoint.keep_best, 1, []
    wanted = {judge, *study.logged_metrics}
    for row in each_row(Path(config.run_dir) / FILE_NAME):
        world_size = row.get("run/world_size", world_size)
        if wanted & row.keys():
            rows.append({name: row[name] for name in ("step", *wanted) if name in row})
    last_step = cell.last_step()
    scores = {row["step"]: row[judge] for row in rows if judge in row and row["step"]}
    step = best_step(scores, judge) or last_step
    numbers = {name: _logged(cell, name, rows, step) for name in study.logged_metrics}
    starts = read_starts(Path(config.run_dir) / TIME_NAME)
    seconds = sum(start.elapsed for start in starts)
    result = Result(
        numbers=numbers,
        step=step,
        num_images=num_images(config),
        exaflops=train_flops(config.model) * last_step * config.global_batch / 1e18,
        device_days=seconds * world_size / 86_400,
    )
    text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
    atomic.write(cell.folder / RESULT_NAME, text.encode())
    return result


def number_of(cell: Cell, result: Result, name: str) -> float:
    """A number that a finished run logged, at the step that counts.

    A study that has got another metric since reads that in the log again. Raises ConfigError
    for a number that the run did not log.
    """
    if name in result.numbers:
        return result.numbers[name]
    path = Path(cell.config.run_dir) / FILE_NAME
    return _logged(cell, name, each_row(path, names=[name]) if path.is_file() else (), result.step)


def _logged(cell: Cell, name: str, rows: Iterable[Mapping[str, Any]], step: int) -> float:
    found = [row[name] for row in rows if name in row and row["step"] <= step]
    if not found:
        raise ConfigError(
            f"{cell.config.run_dir} logged no {name}; add that evaluation to {cell.model.config}, or to the "
            "overrides of the study"
        )
    return found[-1]


def finetune_folder(cell: Cell, recipe: str) -> Path:
    return cell.folder / "finetune" / recipe


def finetuned(cell: Cell, recipe: str) -> dict[str, float] | None:
    """What a recipe gave (finetune.grid.GridResult): mean and std; None before it is there."""
    return _tuned(cell, recipe, lambda values: values)


def on_test_set(cell: Cell, recipe: str, name: str) -> dict[str, float] | None:
    """What a recipe gave on one of its further test sets, as finetuned."""
    return _tuned(cell, recipe, lambda values: values.get("test_sets", {}).get(name))


def _tuned(
    cell: Cell, recipe: str, part: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> dict[str, float] | None:
    """mean and std in a part of what a recipe gave; None where there is none."""

    def parse(values: dict[str, Any]) -> dict[str, float] | None:
        found = part(values)
        return None if found is None else {name: float(found[name]) for name in _GIVEN}

    try:
        return atomic.read_json(finetune_folder(cell, recipe) / "results.json", parse, _REMEDY)
    except FileNotFoundError:
        return None


def num_images(config: TrainConfig) -> int:
    """Of the part of the data set that a run is trained on; about as many, by its fractions."""
    sections = config.data.all_sources()
    total = sum(section.num_samples or Index.load(section.index).num_samples for section in sections)
    return round(total * (1 - share(config.data.validation_fraction)) * share(config.data.fraction))


def slug(name: str) -> str:
    """A name as one of a file."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", name).strip("-.")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
