"""Logs by step: what is dropped at a start, and that it costs no more in an old run."""

import json
import logging
from pathlib import Path

import pytest

from vitscale.metrics.rows import BLOCK_BYTES, each_row, read_metrics, tail_start, trim_metrics
from vitscale.metrics.writer import MetricsWriter

STEPS = 600


def line(step: int, **numbers: float | str) -> bytes:
    return json.dumps({"step": step, **numbers}).encode() + b"\n"


# Of several times the part that is read first. Each tenth step has an evaluation, too.
OLD = [
    row
    for step in range(1, STEPS + 1)
    for row in (line(step, a="x" * 300), *([line(step, b=1.0)] if step % 10 == 0 else []))
]
LATER = line(STEPS + 1, a=1.0)
ENDS = {
    "a whole row": b"",
    "nothing before": None,
    "a cut row": LATER[:-9],
    "a row without its newline": LATER[:-1],
    "torn lines": b"\0\0\n" + LATER + b"[1]\n\n" + LATER[3:],
    "more torn lines than are read first": b"\0" * (2 * BLOCK_BYTES) + b"\n{}\n",
    "late costs of saves": b"".join(
        line(step, **{"checkpoint/seconds": 1.0}) for step in (300, STEPS - 10, STEPS)
    ),
    "many late costs": LATER + line(300, **{"checkpoint/seconds": 1.0, "c": "x" * 200}) * 300,
}


def is_kept(row: bytes, resume_step: int) -> bool:
    try:
        return row.endswith(b"\n") and 0 < json.loads(row)["step"] <= resume_step
    except (ValueError, TypeError, KeyError):
        return False


@pytest.mark.parametrize("resume_step", [0, 1, 300, STEPS - 10, STEPS, STEPS + 5])
@pytest.mark.parametrize("end", ENDS)
def test_trimming_from_the_end_drops_what_lies_past_the_step(
    tmp_path: Path, end: str, resume_step: int
) -> None:
    path, last = tmp_path / "metrics.jsonl", ENDS[end]
    path.write_bytes(b"" if last is None else b"".join(OLD) + last)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [row for row in lines if is_kept(row, resume_step)]
    dropped = [json.loads(row) for row in lines if is_kept(row, STEPS + 5) and row not in kept]
    if resume_step == 0:
        kept = []
    assert trim_metrics(path, resume_step) == dropped
    assert path.read_bytes().splitlines(keepends=True) == kept


@pytest.mark.parametrize("resume_step", [100, 400, STEPS - 1])
def test_another_key_counts_where_rows_have_it(tmp_path: Path, resume_step: int) -> None:
    """A roll-back repeats steps with other data: the step falls, and the data_step rises."""
    sample = "x" * 300
    early = [line(step, sample=sample) for step in range(1, 301)]
    late = [line(step - 200, data_step=step, sample=sample) for step in range(301, STEPS + 1)]
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b"".join(early + late))
    trim_metrics(path, resume_step, "data_step")
    assert path.read_bytes() == b"".join((early + late)[:resume_step])


def test_a_start_reads_the_end_of_a_long_log_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"seen by those who read all of it\n" + b"".join(OLD))
    before = path.stat()
    with caplog.at_level(logging.INFO):
        writer = MetricsWriter(tmp_path, resume_step=STEPS, total_steps=2 * STEPS, tensorboard=False)
        writer.close()
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    assert caplog.text == ""
    assert len(read_metrics(path)) == len(OLD) and "not rows, skipped: 1" in caplog.text


def test_the_end_of_a_log_has_all_rows_of_a_step_that_has_many(tmp_path: Path) -> None:
    path, rows = (
        tmp_path / "metrics.jsonl",
        [line(STEPS, name="x" * 300) for _ in range(2 * BLOCK_BYTES // 300)],
    )
    path.write_bytes(b"".join([*OLD[:-1], *rows]))
    assert 0 < tail_start(path, STEPS) <= sum(map(len, OLD[:-1]))


def test_a_start_knows_all_evaluations_of_a_long_log(tmp_path: Path) -> None:
    judge = "eval/Ähren/top1"
    scores = {100: 0.5, 300: 0.9, STEPS: 0.7}
    rows = [OLD[0], *(line(step, **{judge: score}) for step, score in scores.items())]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*rows[:3], *OLD[300:], rows[3]]))
    writer = MetricsWriter(tmp_path, resume_step=STEPS, total_steps=9, tensorboard=False, judge=judge)
    writer.close()
    assert writer.best_of([100, 300, STEPS]) == 300 and writer.best_of([100, STEPS]) == STEPS
    assert writer.without(["Ähren", "other"]) == ["other"]
    assert [row["step"] for row in each_row(tmp_path / "metrics.jsonl", names=[judge])] == list(scores)
