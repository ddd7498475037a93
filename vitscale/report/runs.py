"""What runs have achieved, from metrics.jsonl: the first and last loss and evaluations."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscale.errors import ConfigError
from vitscale.goodput import summary
from vitscale.metrics import FILE_NAME, read_metrics


def render(runs: Sequence[str]) -> str:
    """The text of `tools/report.py`. Raises ConfigError for a directory without metrics."""
    header = f"{'run':<24} {'number':<28} {'first':>10} {'last':>10}   steps"
    return "\n".join([header, *(line for run in runs for line in _lines(run))])


def _lines(run: str) -> Iterator[str]:
    path = Path(run) / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {run} is not a run directory, or has logged nothing yet")
    rows = read_metrics(path)
    names = dict.fromkeys(
        name for row in rows for name in row if name == "train/loss" or name.startswith("eval/")
    )
    for name in names:
        if not name.endswith(("_std", "num_samples")):
            values = [(row["step"], row[name]) for row in rows if name in row]
            (first_step, first), (last_step, last) = values[0], values[-1]
            yield f"{run:<24} {name:<28} {first:>10.4f} {last:>10.4f}   {first_step} to {last_step}"
    spent = [row for row in rows if "goodput/step" in row]
    if spent:
        yield f"{run:<24} {'wall time':<28} {summary(spent[-1])}"
