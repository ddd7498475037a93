"""What runs have achieved, from metrics.jsonl: the first and last loss and evaluations."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscale.errors import ConfigError
from vitscale.goodput import summary
from vitscale.metrics import FILE_NAME, is_score
from vitscale.report.page.records import read_columns


def render(runs: Sequence[str]) -> str:
    """The text of `tools/report.py`. Raises ConfigError for a directory without metrics."""
    header = f"{'run':<24} {'number':<28} {'first':>10} {'last':>10}   steps"
    return "\n".join([header, *(line for run in runs for line in _lines(run))])


def _lines(run: str) -> Iterator[str]:
    path = Path(run) / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {run} is not a run directory, or has logged nothing yet")
    columns = read_columns(path)
    if not columns:
        raise ConfigError(f"{path} holds no row of numbers: {run} has logged nothing yet")
    for name, column in columns.items():
        if name == "train/loss" or is_score(name):
            steps = f"{column.steps[0]:.0f} to {column.steps[-1]:.0f}"
            yield f"{run:<24} {name:<28} {column.first:>10.4f} {column.last:>10.4f}   {steps}"
    spent = {name: column.last for name, column in columns.items() if name.startswith("goodput/")}
    if spent:
        yield f"{run:<24} {'wall time':<28} {summary(spent)}"
