"""What a run directory holds, read for the page: whatever is missing there is empty here."""

import array
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from vitscale import config as configs
from vitscale import toml
from vitscale.checkpoint.verify import check_all, committed
from vitscale.data.quarantine import FILE_NAME as QUARANTINE_NAME
from vitscale.errors import ConfigError, UserError
from vitscale.guard import ending
from vitscale.guard.spikes import FILE_NAME as SPIKES_NAME
from vitscale.metrics import goodput
from vitscale.metrics.expect import Verdict, judge
from vitscale.metrics.rows import each_row, read_metrics
from vitscale.metrics.writer import FILE_NAME as METRICS_NAME
from vitscale.metrics.writer import HASHES
from vitscale.report.listing import RunListing, list_run
from vitscale.run_dir import history
from vitscale.run_dir.directory import CONFIG_NAME
from vitscale.stores import storage
from vitscale.train_config import TrainConfig

VERIFIED_BYTES = 2 << 30  # checkpoints up to so many in all are read, to verify their checksums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """The values of one metric. steps: floats, for they are drawn."""

    steps: Float64[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])


class Replaced(NamedTuple):
    """How often a sample was replaced, and the steps of the first and last rows that say so."""

    times: int
    first_step: int
    last_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A run directory.

    name: what the page calls it. columns: metrics by name, each with a value at least.
    written: when the last row was, in seconds since the epoch; 0 = never. values: of
    config.toml, as they are. config: the same, None if this version cannot read it; problem:
    why. starts: rows of history.jsonl. times: of time.json. quarantine: by sentence.
    checkpoints: None if there are none; no_checkpoints: why.
    """

    path: str
    name: str
    columns: Mapping[str, Column]
    written: float
    status: Mapping[str, Any]
    values: Mapping[str, Any]
    config: TrainConfig | None
    problem: str
    starts: Sequence[Mapping[str, Any]]
    times: Sequence[goodput.Start]
    quarantine: Mapping[str, Replaced]
    spikes: Sequence[Mapping[str, Any]]
    checkpoints: RunListing | None
    no_checkpoints: str

    @property
    def last_step(self) -> int:
        return max([0, *(int(column.steps[-1]) for column in self.columns.values())])

    @functools.cached_property
    def verdicts(self) -> dict[str, Verdict | None]:
        """How each metric stands beside what the config expects of it."""
        bands = self.config.expect.bands if self.config else {}
        verdicts = dict[str, Verdict | None]()
        for name, band in bands.items():
            if not band:  # removed by a later config
                continue
            verdict, column = None, self.columns.get(name)
            for step, value in zip(column.steps, column.values, strict=True) if column else ():
                verdict = judge(band, int(step), float(value), verdict)
            verdicts[name] = verdict
        return verdicts


def read_records(runs: Sequence[str]) -> list[Record]:
    """The records of run directories. Raises ConfigError for what is no run directory."""
    names = short_names([storage.local_path(run) for run in runs])
    return [_read(run, name) for run, name in zip(runs, names, strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """As many last parts of each path as tell them all apart.

    Example: runs/a/pretrain and runs/a/finetune are "pretrain" and "finetune".
    """
    parts = [Path(path).absolute().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(paths)


def read_columns(path: Path) -> dict[str, Column]:
    """The numbers of metrics.jsonl by metric; what is no number is passed over."""
    columns: dict[str, tuple[array.array[float], array.array[float]]] = {}
    for step, name, value in each_number(path):
        arrays = columns.get(name)
        if not arrays:
            arrays = columns[name] = array.array("d"), array.array("d")
        arrays[0].append(step)
        arrays[1].append(value)
    return {name: _column(*columns.pop(name)) for name in list(columns)}  # no more than one twice


def each_number(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, metric, value) of the numbers of metrics.jsonl."""
    for row in each_row(path):
        for name, value in row.items():
            is_number = type(value) is float or (type(value) is int and abs(value) < 2**63)
            if is_number and name not in ("step", *HASHES):
                yield row["step"], name, float(value)


def _column(steps: "array.array[float]", values: "array.array[float]") -> Column:
    """With rising steps, whatever the order of the rows."""
    order = np.argsort(np.array(steps), kind="stable")
    return Column(steps=np.array(steps)[order], values=np.array(values)[order])


def _read(run: str, name: str) -> Record:
    if not storage.is_local(run):
        raise ConfigError(
            f"{run} is a store, which holds a run's checkpoints and not its metrics; name the run directory"
        )
    folder = Path(storage.local_path(run))
    metrics = folder / METRICS_NAME
    status = ending.read(folder)
    if not metrics.is_file() and not status:
        raise ConfigError(
            f"{metrics} does not exist: {run} is not a run directory, or has logged nothing yet"
        )
    values, config, problem = _read_config(folder / CONFIG_NAME)
    checkpoints, no_checkpoints = _read_checkpoints(str(folder))
    return Record(
        path=str(folder),
        name=name,
        columns=read_columns(metrics) if metrics.is_file() else {},
        written=metrics.stat().st_mtime if metrics.is_file() else 0.0,
        status=status or {},
        values=values,
        config=config,
        problem=problem,
        starts=_rows(folder / history.FILE_NAME),
        times=goodput.read_starts(folder / goodput.FILE_NAME),
        quarantine=_read_quarantine(folder / QUARANTINE_NAME),
        spikes=_rows(folder / SPIKES_NAME),
        checkpoints=checkpoints,
        no_checkpoints=no_checkpoints,
    )


def _read_quarantine(path: Path) -> dict[str, Replaced]:
    """Each sentence once: it has a row for every epoch."""
    replaced: dict[str, Replaced] = {}
    for row in each_row(path) if path.is_file() else ():
        sentence, step = str(row.get("sample", "?")), row["step"]
        before = replaced.get(sentence, Replaced(0, step, step))
        replaced[sentence] = Replaced(before.times + 1, before.first_step, step)
    return replaced


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _read_config(path: Path) -> tuple[dict[str, Any], TrainConfig | None, str]:
    """The plain values of a config.toml, the config, and why there is none."""
    values: dict[str, Any] = {}
    try:
        values = toml.parse(path.read_text(encoding="utf-8"))
        return values, configs.load(TrainConfig, [path]), ""
    except FileNotFoundError:
        return values, None, f"{path} does not exist: a run writes it after its first evaluation"
    except (ValueError, OSError) as error:
        return values, None, f"{path} cannot be read by this vitscale: {error}"


def _read_checkpoints(run: str) -> tuple[RunListing | None, str]:
    """The listing of a run, verified if there is not too much to read, and why none."""
    try:
        verdicts = check_all([folder for _, folder in committed(run)], checksums=False)
        num_bytes = sum(verdict.manifest.num_bytes for verdict in verdicts if verdict.manifest)
        return list_run(run, checksums=num_bytes <= VERIFIED_BYTES), ""
    except UserError as error:
        return None, str(error)
