"""How a run went: where its time went, how often it was started, and what it has saved."""

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vitscale.checkpoint.manifest import Manifest
from vitscale.errors import UserError
from vitscale.metrics import goodput
from vitscale.quantities import size_text
from vitscale.report.listing import CheckpointRow
from vitscale.report.page.chart import stacked_bar
from vitscale.report.page.html import Html, details, element, joined, note, table
from vitscale.report.page.overview import duration
from vitscale.report.page.records import Record
from vitscale.report.text import when

KINDS = {
    "step": "steps", "data": "waiting for data", "evaluate": "evaluation", "save": "saving",
    "start": "starting", "lost": "lost work", "idle": "no process ran", "log": "logging", "other": "other",
}  # fmt: skip
STAGES = {"read": "reading", "decode": "decoding", "finish": "finishing", "idle": "idle or sending"}
MAX_CHANGES = 20  # changed keys shown of one start
SHOWN_STARTS = 5  # rows of the table of times that is open


def time_spent(record: Record) -> Html:
    """The parts of the wall time and of the data workers' time; empty if none is written."""
    bars = []
    if record.times:
        parts = goodput.fractions(record.times)
        named = {text: parts[kind] for kind, text in KINDS.items()}
        bars.append(stacked_bar("Wall time since the first start", named))
    stages = {
        text: float(column.values.mean())
        for stage, text in STAGES.items()
        if (column := record.columns.get(f"loader/{stage}_fraction"))
    }
    if stages:
        bars.append(stacked_bar("Time of the data workers, mean over the rows", stages))
    return element("div", *bars, class_="charts") if bars else Html()


def starts(record: Record) -> Html:
    """Every start, with its layout and what was changed, and what its time went to."""
    before = [None, *record.starts]
    rows = [
        _start(number, row, old)
        for number, row, old in zip(itertools.count(1), record.starts, before, strict=False)
    ]
    parts = []
    if rows:
        header = ["", "when", "host", "from step", "ranks", "ZeRO", "micro batch", "what is new"]
        parts.append(table(header, rows, caption="When, where and on which layout", right=(0, 3, 4, 5)))
    else:
        parts.append(note("There is no history.jsonl: its first step is to come, or vitscale was older."))
    if record.times:
        kinds = _times(record.times)
        is_short = len(record.times) <= SHOWN_STARTS
        parts.append(kinds if is_short else details(f"Time of each of {len(record.times):,} starts", kinds))
    return joined(parts)


def checkpoints(record: Record, now: datetime.datetime) -> Html:
    """The checkpoints that are there, and whether they are sound."""
    if record.checkpoints is None:
        return note(f"{record.no_checkpoints}.")
    rows = [_checkpoint(row, now) for row in record.checkpoints.checkpoints]
    header = ["step", "saved", "age", "size", "ranks", "ZeRO", "files", "losses and gradients"]
    parts = [table(header, rows, caption="What was saved and kept", right=(0, 2, 3, 4, 5))]
    problems = [row.problem for row in record.checkpoints.checkpoints if row.problem]
    parts += [note(f"{sentence}.") for sentence in (*problems, *record.checkpoints.notes)]
    if any(row.status == "not verified" for row in record.checkpoints.checkpoints):
        verify = f"python tools/checkpoint.py list {record.path}"
        parts.append(note(f"Only sizes were compared; to read and verify all files: {verify}"))
    return joined(parts)


def _start(number: int, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    texts = []
    if before and _count(row, "rollbacks") > _count(before, "rollbacks"):
        passed = _count(row, "data_step") - row["step"]
        texts.append(f"rolled back to step {row['step']:,}; {passed:,} batches are passed over in all")
    changed = _table(row.get("changed"))
    texts += [f"{key} = {_now(values)}" for key, values in list(changed.items())[:MAX_CHANGES]]
    if len(changed) > MAX_CHANGES:
        texts.append(f"and {len(changed) - MAX_CHANGES:,} more keys")
    old = _table(before.get("versions")) if before else {}
    versions = _table(row.get("versions")).items()
    texts += [f"{name} {version}" for name, version in versions if old.get(name) != version]
    accumulated = row.get("grad_accum_steps", 1)
    micro_batch = str(row.get("micro_batch", ""))
    return [
        f"{number:,}",
        str(row.get("time", "")).replace("T", " "),
        str(row.get("host", "")),
        f"{row['step']:,}",
        str(row.get("world_size", "")),
        str(row.get("zero_stage", "")),
        micro_batch if accumulated == 1 else f"{accumulated} x {micro_batch}",
        element("span", "; ".join(texts), class_="wide"),
    ]


def _now(values: Any) -> str:
    """The new and the old value of a changed key."""
    is_pair = isinstance(values, list) and len(values) == 2
    return f"{values[1]!r} (before: {values[0]!r})" if is_pair else "?"


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) else 0


def _table(values: Any) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {}


def _times(starts: Sequence[goodput.Start]) -> Html:
    """What the time of each start went to; kinds that never took half a second are left out."""
    spent = [start.spent(is_last=start is starts[-1]) for start in starts]
    kinds = [kind for kind in KINDS if any(seconds.get(kind, 0.0) >= 0.5 for seconds in spent)]
    rows = [
        [
            f"{number:,}",
            f"{datetime.datetime.fromtimestamp(start.began, datetime.UTC).astimezone():%Y-%m-%d %H:%M}",
            duration(start.elapsed),
            f"{start.step:,}",
            *(duration(seconds.get(kind, 0.0)) for kind in kinds),
        ]
        for number, start, seconds in zip(itertools.count(1), starts, spent, strict=False)
    ]
    header = ["", "began", "took", "last step", *(KINDS[kind] for kind in kinds)]
    return table(header, rows, caption="Time of each start", right=range(2, len(header)))


def _checkpoint(row: CheckpointRow, now: datetime.datetime) -> list[str]:
    mark = {"verified": "good", "DAMAGED": "bad"}.get(row.status, "warn")
    status = [element("span", row.status.lower(), class_=f"state {mark}"), " latest" if row.latest else ""]
    if not row.facts:
        return [f"{row.step:,}", "", "", "", "", "", joined(status), ""]
    return [
        f"{row.step:,}",
        *when(row.facts["created"], now),
        size_text(row.num_bytes),
        f"{row.facts['world_size']:,}",
        str(row.facts["zero_stage"]),
        joined(status),
        _health(row),
    ]


def _health(row: CheckpointRow) -> str:
    """Whether the losses and gradients before a checkpoint were finite."""
    try:
        healthy = Manifest.load(row.path).train.healthy
    except (UserError, OSError):
        return ""
    return "finite" if healthy else element("span", "not finite", class_="state bad")
