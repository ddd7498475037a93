"""The head of the page: what the runs are, how they stand, their key figures and configs."""

import datetime
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitscale import config as configs
from vitscale.data.data_config import DataConfig
from vitscale.image_size import pixels
from vitscale.metrics import goodput
from vitscale.metrics.writer import is_score
from vitscale.models import empty_model
from vitscale.report.compare import flatten
from vitscale.report.page.html import Html, details, element, escaped, joined, note, table
from vitscale.report.page.records import Record
from vitscale.report.page.scale import form, percent, short
from vitscale.report.text import when
from vitscale.train_config import TrainConfig

STATES = {
    "done": "all of its steps are done",
    "preempted": "it was asked to stop and has saved: the same command continues",
    "stopped": "the file stop asked it to stop, and it has saved: the same command continues",
    "failed": "it has failed",
    "running": "no end is written: it runs, or was killed",
}


def scores(record: Record) -> list[str]:
    """The metrics that are results of evaluations."""
    return [name for name in record.columns if is_score(name)]


def header(records: Sequence[Record], now: datetime.datetime) -> Html:
    """Title, and of every run its state and the reason."""
    title = element("h1", ", ".join(record.name for record in records))
    made = element("p", f"vitscale run report, made {now.astimezone():%Y-%m-%d %H:%M %Z}", class_="sub")
    return joined([title, made, *(_standing(record, now, named=len(records) > 1) for record in records)])


def overview(records: Sequence[Record]) -> Html:
    """The key figures: as tiles of one run, as a table of several."""
    if len(records) == 1:
        tiles = [
            element("div", element("b", value), element("span", name), class_="tile")
            for name, value in _figures(records[0]).items()
        ]
        return element("div", *tiles, class_="tiles")
    figures = [_figures(record) for record in records]
    names = dict.fromkeys(name for of_run in figures for name in of_run)
    rows = [[name, *(of_run.get(name, "") for of_run in figures)] for name in names]
    return table(
        ["", *(record.name for record in records)],
        rows,
        caption="Key figures",
        right=range(1, len(records) + 1),
    )


def differences(records: Sequence[Record]) -> Html:
    """The config keys in which several runs differ."""
    flat = [dict(flatten(record.values)) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [
        [key, *(_value(values.get(key)) for values in flat)]
        for key in keys
        if any(values.get(key) != flat[0].get(key) for values in flat)
    ]
    if not rows:
        return note("Their configs are equal.")
    return table(["key", *(record.name for record in records)], rows, caption="Config keys that differ")


def config_text(record: Record) -> Html:
    """What a run was told to do: the keys that differ from the defaults, and all of them."""
    if record.config is None:
        return note(f"{record.problem}.")
    set_values = _not_default(configs.to_dict(record.config))
    rows = [[key, _value(value)] for key, value in set_values.items()]
    text = element("pre", configs.to_toml(record.config))
    chosen = table(["key", "value"], rows, caption="Keys that differ from their defaults")
    return joined([chosen, details("The whole config, which loads as it is", text)])


def _not_default(values: Mapping[str, Any]) -> dict[str, Any]:
    default = TrainConfig(run_dir="-", total_steps=1, data=DataConfig(index="-"))  # what has no default
    defaults = dict(flatten(configs.to_dict(default)))
    return {key: value for key, value in flatten(values) if key not in defaults or defaults[key] != value}


def _standing(record: Record, now: datetime.datetime, *, named: bool) -> Html:
    """A line with a run's state, its reason and its last sign of life."""
    status = record.status
    state = str(status.get("state", "unknown"))
    texts = [STATES.get(state, "how it ended is not written: an earlier vitscale made it")]
    if status.get("reason"):
        texts = [str(status["reason"])]
    elif state in ("running", "unknown") and record.written:
        moment = datetime.datetime.fromtimestamp(record.written, datetime.UTC)
        texts.append(f"its last row was written {when(moment.isoformat(), now)[1]} ago")
    name = joined([element("b", record.name), " "]) if named else ""
    badge = element("span", state, class_=f"state {state if state in STATES else ''}")
    return element("p", name, badge, " ", "; ".join(texts), element("br"), element("small", record.path))


def _figures(record: Record) -> dict[str, str]:
    """Name and text of every key figure that a run has."""
    last, total = record.last_step, record.status.get("total_steps")
    figures = {"steps": f"{last:,} of {total:,}" if isinstance(total, int) else f"{last:,}"}
    figures |= _on_track(record)
    for name, label in (("train/loss_mean", "training loss, mean"), ("train/loss", "training loss")):
        if (column := record.columns.get(name)) and "training loss, mean" not in figures:
            figures[label] = f"{column.first:.4g} to {column.last:.4g}"
    for name in scores(record):
        figures[name.removeprefix("eval/")] = form(name)(record.columns[name].last)
    if config := record.config:
        figures["model"] = _model(config)
        num_params = sum(param.numel() for param in empty_model(config.model).parameters())
        figures["parameters"] = f"{num_params:,}"
        figures["images of a step"] = f"{config.global_batch:,}, {config.precision}"
    if seen := record.columns.get("samples_seen"):
        figures["samples seen"] = f"{seen.last:,.0f}" if seen.last < 1e9 else short(seen.last)
    if speed := record.columns.get("perf/images_per_second"):
        figures["images/s, median"] = f"{np.median(speed.values):,.0f}"
    if times := record.times:
        figures["goodput"] = percent(round(goodput.fractions(times)["step"], 3))
        figures["wall time"] = duration(times[-1].began + times[-1].elapsed - times[0].began)
    figures["starts"] = f"{max(len(record.starts), len(record.times), 1):,}"
    for name, label in (("data/bad_samples", "samples replaced"), ("train/skipped_steps", "steps skipped")):
        if column := record.columns.get(name):
            figures[label] = f"{column.last:,.0f}"
    return figures


def _on_track(record: Record) -> dict[str, str]:
    """Whether a run's metrics are as its config expects."""
    verdicts = [verdict for verdict in record.verdicts.values() if verdict]
    if not verdicts:
        return {}
    on_track = sum(verdict.on_track for verdict in verdicts)
    good = on_track == len(verdicts)
    text = "on track" if good else f"{len(verdicts) - on_track} of {len(verdicts)} off"
    return {"expectations": element("span", text, class_=f"state {'good' if good else 'bad'}")}


def _model(config: TrainConfig) -> str:
    model = config.model
    return f"{model.kind} {model.title}, {pixels(model.image_size)}"


def duration(seconds: float) -> str:
    """A time in the two largest units: "3 d 4 h", "2 min 5 s"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = max(0, round(seconds))
    for (unit, length), (smaller, part) in itertools.pairwise(units):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def _value(value: Any) -> Html:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return element("span", escaped(text), class_="wide")
