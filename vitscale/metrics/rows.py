"""Reads the rows of metrics.jsonl and of other logs by step, and drops those of lost steps.

A run of weeks has millions of rows. A start of it reads those near the end only, and no reader
has to hold them all in memory.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vitscale.system import atomic

logger = logging.getLogger(__name__)
NON_FINITE = ("nan", "inf", "-inf")
SAVE_SECONDS = "checkpoint/seconds"  # a row with it is of the step of a save, and may be late
BLOCK_BYTES = 1 << 16  # to copy at once, and of a file's end to look at first


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, except for a last row that is half written.

    Other lines that are not rows are skipped with a warning.
    """
    return list(each_row(path))


def each_row(
    path: str | os.PathLike[str], *, start: int = 0, names: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of read_metrics, one at a time: those of a long run take much memory at once.

    start: where the first line begins. names: only rows that have one of these, about ten times
    as fast if few do; () = all rows.
    """
    num_skipped, keys = 0, [json.dumps(name).encode() for name in names]
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            if keys and not any(key in line for key in keys):
                continue
            if row := _parse_row(line):
                yield row
            elif line.endswith(b"\n"):
                num_skipped += 1
    if num_skipped:
        logger.warning("%s: lines that are not rows, skipped: %d", path, num_skipped)


def tail_start(path: Path, step: int, key: str = "step") -> int:
    """The offset of a line near the end; every row before it has a step below `step`.

    Steps rise from row to row, but for the costs of saves. key: as in trim_metrics.
    """
    size, num_bytes = path.stat().st_size, BLOCK_BYTES
    while num_bytes < size:
        with open(path, "rb") as file:
            file.seek(size - num_bytes)
            file.readline()  # its beginning may be missing
            start = file.tell()
            rows = (row for row in map(_parse_row, file) if row and SAVE_SECONDS not in row)
            first = next(rows, None)
        if first and first.get(key, first["step"]) < step:
            return start
        num_bytes *= 2
    return 0


def trim_metrics(path: Path, resume_step: int, key: str = "step") -> list[dict[str, Any]]:
    """Drop rows past `resume_step` and torn ones, atomically; 0, a fresh start, drops all.

    key: what of a row counts; "step" where it has no other. Rows rise by it, because each start
    trims the file, so lines far before `resume_step` are not read. Returns the whole rows that
    were dropped.
    """
    if not path.exists():
        return []
    start = tail_start(path, resume_step, key)
    kept: list[bytes] = []
    dropped: list[dict[str, Any] | None] = []  # None = torn
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            row = _parse_row(line)
            if row is not None and 0 < resume_step >= row.get(key, row["step"]):
                kept.append(line)
            else:
                dropped.append(row)
    if dropped:
        logger.info("%s: dropped %d rows past step %d", path, len(dropped), resume_step)
        with (
            atomic.named(path),
            atomic.appearing(path) as temporary,
            open(path, "rb") as old,
            open(temporary, "wb") as new,
        ):
            while block := old.read(min(BLOCK_BYTES, start - old.tell())):
                new.write(block)
            new.writelines(kept)
    return [row for row in dropped if row is not None]


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """A row; None if it is torn: a complete one ends in a newline."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    steps = (row.get("step"), row.get("data_step", 0)) if isinstance(row, dict) else (None,)
    if not all(isinstance(step, int) and abs(step) < 2**63 for step in steps):
        return None
    return {name: float(value) if value in NON_FINITE else value for name, value in row.items()}
