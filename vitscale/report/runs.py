"""What runs have achieved, from metrics.jsonl: the first and last loss and evaluations."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscale.errors import ConfigError
from vitscale.metrics.goodput import summary
from vitscale.metrics.writer import FILE_NAME, is_score
from vitscale.report.page.records import each_number


@dataclasses.dataclass(slots=True)
class Ends:
    """The values of a metric at its first step and at its last one."""

    first_step: int
    first: float
    last_step: int
    last: float


def render(runs: Sequence[str]) -> str:
    """The text of `tools/report.py`. Raises ConfigError for a directory without metrics."""
    header = f"{'run':<24} {'number':<28} {'first':>10} {'last':>10}   steps"
    return "\n".join([header, *(line for run in runs for line in _lines(run))])


def _lines(run: str) -> Iterator[str]:
    path = Path(run) / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {run} is not a run directory, or has logged nothing yet")
    ends = _read_ends(path)
    if not ends:
        raise ConfigError(f"{path} holds no row of numbers: {run} has logged nothing yet")
    for name, end in ends.items():
        if name == "train/loss" or is_score(name):
            steps = f"{end.first_step} to {end.last_step}"
            yield f"{run:<24} {name:<28} {end.first:>10.4f} {end.last:>10.4f}   {steps}"
    spent = {name: end.last for name, end in ends.items() if name.startswith("goodput/")}
    if spent:
        yield f"{run:<24} {'wall time':<28} {summary(spent)}"


def _read_ends(path: Path) -> dict[str, Ends]:
    """By metric; of rows of one step, the first is first and the last is last."""
    ends: dict[str, Ends] = {}
    for step, name, value in each_number(path):
        end = ends.get(name)
        if not end:
            end = ends[name] = Ends(step, value, step, value)
        if step < end.first_step:
            end.first_step, end.first = step, value
        if step >= end.last_step:
            end.last_step, end.last = step, value
    return ends
