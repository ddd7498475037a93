"""A run's numbers: one row per step after any resume, bit for bit the same in TensorBoard."""

import io
import json
import logging
import math
import resource
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.metrics import writer as metrics
from vitscale.metrics.expect import ExpectConfig
from vitscale.metrics.rows import read_metrics, trim_metrics
from vitscale.metrics.writer import MetricsWriter, remaining_time


def write_rows(run_dir: Path, steps: range, *, resume_step: int = 0, scale: float = 1.0) -> None:
    writer = MetricsWriter(run_dir, resume_step=resume_step, total_steps=100, tensorboard=False)
    for step in steps:
        writer.write(step, {"train/loss": scale / step})
    writer.close()


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_rows_read_back_bit_for_bit_while_the_run_continues(tmp_path: Path):
    losses = [float(np.float32(x)) for x in np.random.default_rng(0).normal(size=50)]
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=50, tensorboard=False)
    for step, loss in enumerate(losses, start=1):
        writer.write(step, {"train/loss": loss, "data/digest": 2**63 - step})
    rows = read_metrics(tmp_path / "metrics.jsonl")  # before close: each row is flushed when it is written
    writer.close()
    assert [row["train/loss"] for row in rows] == losses
    assert rows[0] == {"step": 1, "train/loss": losses[0], "data/digest": 2**63 - 1}


def test_a_resumed_run_has_each_step_once(tmp_path: Path):
    write_rows(tmp_path, range(1, 9))
    write_rows(tmp_path, range(6, 11), resume_step=5, scale=2.0)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[4]["train/loss"] == 1 / 5 and rows[5]["train/loss"] == 2 / 6


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        (1.0, "step 6 was done before, with the same loss"),
        (2.0, "with the loss 0.166667: now it differs by 1.7e-01"),
    ],
)
def test_the_first_repeated_step_is_compared_with_what_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float, sentence: str
):
    write_rows(tmp_path, range(1, 9))
    with caplog.at_level(logging.INFO):
        write_rows(tmp_path, range(6, 9), resume_step=5, scale=scale)
    said = [record.getMessage() for record in caplog.records if "was done before" in record.getMessage()]
    assert len(said) == 1 and sentence in said[0]


def test_steps_that_read_other_data_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    for resume_step, digest in ((0, 7), (1, 8)):
        writer = MetricsWriter(tmp_path, resume_step=resume_step, total_steps=9, tensorboard=False)
        writer.write(2, {"train/loss": 1.0, "data/digest": digest})
        writer.close()
    assert "was done before" not in caplog.text


def test_a_row_torn_by_a_kill_is_dropped(tmp_path: Path):
    write_rows(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_of(tmp_path) == [1, 2, 3]
    write_rows(tmp_path, range(4, 6), resume_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_row_whose_steps_are_no_numbers_is_dropped_as_a_torn_one(tmp_path: Path):
    path, whole = tmp_path / "spikes.jsonl", '{"step": 4, "data_step": 4}\n'
    path.write_text(whole + '{"step": 4, "data_step": null}\n{"step": 4, "data_step": {}}\n{}\n')
    assert trim_metrics(path, 4, "data_step") == [] and path.read_text() == whole


def test_a_whole_last_row_without_its_newline_does_not_swallow_the_next(tmp_path: Path):
    write_rows(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_rows(tmp_path, range(2, 4), resume_step=1)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_fresh_start_keeps_nothing(tmp_path: Path):
    for steps in (range(1, 5), range(1, 3)):
        writer = MetricsWriter(tmp_path, resume_step=0, total_steps=100, tensorboard=False)
        writer.write(0, {"eval/x/top1": 0.1})  # before the first step
        writer.close()
        assert steps_of(tmp_path) == [0]
        write_rows(tmp_path, steps)
        assert steps_of(tmp_path) == list(steps)


def test_a_resume_keeps_the_evaluation_before_the_first_step(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval/x/top1": 0.1}\n{"step": 1, "train/loss": 2.0}\n'
    )
    write_rows(tmp_path, range(2, 3), resume_step=1)
    assert steps_of(tmp_path) == [0, 1, 2]


def test_a_disk_that_refuses_a_row_is_named_by_the_file(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large") as refused,
            MetricsWriter(tmp_path, resume_step=0, total_steps=9, tensorboard=False) as metrics,
        ):
            for step in range(1, 10):
                metrics.write(step, {"train/loss": 0.1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.filename == str(tmp_path / "metrics.jsonl")
    with MetricsWriter(tmp_path, resume_step=3, total_steps=9, tensorboard=False):
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_trimming_replaces_the_file_in_one_step(tmp_path: Path):
    write_rows(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    before = path.stat().st_ino
    with open(path, "rb") as old:
        trim_metrics(path, 2)
        assert old.read().count(b"\n") == 4  # a reader that had the old file open still has all of it
    assert path.stat().st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_without_anything_to_trim_is_not_written_again(tmp_path: Path):
    write_rows(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    before = path.stat().st_ino
    trim_metrics(path, 4)
    assert path.stat().st_ino == before and steps_of(tmp_path) == [1, 2, 3, 4]


def test_non_finite_numbers_stay_valid_json(tmp_path: Path):
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=1, tensorboard=False)
    writer.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "x": -math.inf})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "train/loss": "nan", "train/grad_norm": "inf", "x": "-inf"}\n'
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["train/loss"]) and row["train/grad_norm"] == math.inf and row["x"] == -math.inf


def test_tensorboard_holds_the_same_numbers_after_a_resume(tmp_path: Path):
    for resume_step, steps, scale in ((0, range(1, 8), 1.0), (4, range(5, 11), 2.0)):
        writer = MetricsWriter(tmp_path, resume_step=resume_step, total_steps=10)
        for step in steps:
            writer.write(step, {"train/loss": scale / step})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    scalars = [(event.step, event.value) for event in events.Scalars("1_train/loss")]
    assert scalars == [(row["step"], float(np.float32(row["train/loss"]))) for row in rows]
    assert [step for step, _ in scalars] == list(range(1, 11))


def test_the_cost_of_a_save_stays_with_its_step_after_a_resume_from_it(tmp_path: Path):
    """It is known some steps later, as the save is written in the background."""
    for resume_step, saves in ((0, {6: 4, 8: 7}), (4, {6: 5, 9: 8})):
        writer = MetricsWriter(tmp_path, resume_step=resume_step, total_steps=10)
        for step in range(resume_step + 1, 10):
            writer.write(step, {"train/loss": 1 / step})
            if step in saves:
                writer.write(saves[step], {"checkpoint/seconds": float(step)})
        writer.close()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "checkpoint/seconds" in row]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("6_checkpoint/seconds")]
    assert [(row["step"], row["checkpoint/seconds"]) for row in rows] == scalars
    assert scalars == [(4, 6.0), (5, 6.0), (8, 9.0)]
    assert [event.step for event in events.Scalars("1_train/loss")] == list(range(1, 10))


def test_tensorboard_follows_a_start_whose_clock_is_behind_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = time.time()
    # Three starts within a second, then two by clocks that are behind.
    for resume_step, clock in ((0, now), (2, now), (4, now), (6, now - 3600), (8, now - 7200)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        writer = MetricsWriter(tmp_path, resume_step=resume_step, total_steps=12)
        for step in range(resume_step + 1, resume_step + 5):
            writer.write(step, {"train/loss": float(10 * resume_step + step)})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(event.step, event.value) for event in events.Scalars("1_train/loss")] == [
        (row["step"], row["train/loss"]) for row in rows
    ]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_a_start_does_not_hold_the_rows_of_a_long_run_in_memory(tmp_path: Path):
    row = {f"loader/number_{n}": n / 7 for n in range(20)}
    lines = [json.dumps({"step": step, "train/loss": 1 / step, **row}) + "\n" for step in range(1, 2001)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    num_bytes = len("".join(lines))
    tracemalloc.start()
    writer = MetricsWriter(tmp_path, resume_step=1990, total_steps=4000, tensorboard=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.close()
    assert steps_of(tmp_path) == list(range(1, 1991)) and peak < num_bytes / 4


def test_images_and_hyperparameters_reach_tensorboard(tmp_path: Path):
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=1)
    writer.write_images("inputs", torch.full((4, 3, 6, 6), 200, dtype=torch.uint8))
    writer.write(0, {"eval/test/top1": 0.5, "data/digest": 2**63})
    writer.write_texts({"config": 'seed = 0\n[model]\nindex = "https://h/index.json?sig=1"'})
    writer.write_hparams(
        {
            "index": "https://h/index.json?sig=1",
            "model": {"variant": "B/16"},
            "optim": {"betas": [0.9, 0.999], "lr": 1e-3},
        }
    )
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["3_data/inputs"]
    assert [event.step for event in events.Images("3_data/inputs")] == [0]
    assert events.Tags()["scalars"] == ["2_eval/test/top1"], "a hash is no curve"
    (text,) = events.Tensors("config/text_summary")
    assert text.tensor_proto.string_val == [
        b'```\nseed = 0\n[model]\nindex = "https://h/index.json?***"\n```'
    ]
    columns = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"1_train/loss_mean" in columns and b"2_eval/test/top1" in columns
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"https://h/index.json?***" in content and b"sig" not in content
    assert b"model.variant" in content and b"B/16" in content and b"[0.9, 0.999]" in content


def test_tensorboard_begins_with_training_then_evaluations_then_costs(tmp_path: Path):
    """Its groups are what precedes the first slash, sorted by name."""
    names = ("checkpoint/seconds", "data/bad_samples", "epoch", "eval/val/top1", "perf/mfu", "samples_seen")
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=1)
    writer.write(1, dict.fromkeys((*names, "time/data_wait_fraction", "train/lr", "train/loss"), 1.0))
    writer.close()
    tags = sorted(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"])
    groups = dict.fromkeys(tag.split("/")[0] for tag in tags)
    assert list(groups) == ["1_train", "2_eval", "3_data", "4_perf", "5_time", "6_checkpoint"]
    assert [tag for tag in tags if tag.startswith("3_data/")] == [
        "3_data/bad_samples", "3_data/epoch", "3_data/samples_seen",
    ]  # fmt: skip


def test_without_a_terminal_each_row_is_one_plain_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="vitscale")
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=200, tensorboard=False)
    writer.write(
        50,
        {
            "train/loss": 2.25,
            "train/lr": 1e-3,
            "perf/images_per_second": 1234.5,
            "time/data_wait_fraction": 0.015,
        },
    )
    writer.write(50, {"eval/cifar10/10shot": 0.44})
    writer.close()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("step 50/200  loss 2.2500  lr 1.00e-03  img/s 1,234  data wait 1.5%  eta ")
    assert second.startswith("step 50/200  eval/cifar10/10shot 0.44")


def test_on_a_terminal_a_bar_shows_step_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    writer = MetricsWriter(tmp_path, resume_step=20, total_steps=40, tensorboard=False)
    writer.write(30, {"train/loss": 2.25})
    writer.write(30, {"eval/cifar10/10shot": 0.44})
    writer.close()
    shown = terminal.getvalue()
    assert "30/40" in shown and "loss 2.2500" in shown and "eval/cifar10/10shot 0.44\n" in shown


@pytest.mark.parametrize(
    ("elapsed_seconds", "num_done", "num_left", "text"),
    [
        (10.0, 4, 100, "04:10"),
        (10.0, 4, 1, "00:02"),  # 2.5 s
        (10.0, 4, 0, "00:00"),
        (10.0, 4, -3, "00:00"),  # a run whose total was shortened
        (1.0, 1, 3661, "1:01:01"),
        (10.0, 1, 6, "01:00"),
        (10.0, 0, 100, "?"),
        (10.0, -1, 100, "?"),
    ],
)
def test_the_remaining_time_is_the_steps_left_at_the_pace_so_far(
    elapsed_seconds: float, num_done: int, num_left: int, text: str
):
    assert remaining_time(elapsed_seconds, num_done, num_left) == text


def test_a_resumed_run_takes_its_pace_from_its_own_steps_after_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.INFO, logger="vitscale")
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    writer = MetricsWriter(tmp_path, resume_step=20, total_steps=40, tensorboard=False)
    for step, name, clock.now in (
        (20, "eval/a/top1", 100.0),
        (21, "train/loss", 160.0),  # the first step took a minute, to compile
        (21, "checkpoint/seconds", 161.0),  # in the files only
        (25, "train/loss", 170.0),  # 4 more steps took 10 s, and 15 are left
        (25, "eval/a/top1", 180.0),
    ):
        writer.write(step, {name: 1.0})
    writer.close()
    etas = [record.getMessage().rpartition("  ")[2] for record in caplog.records]
    assert etas == ["eta ?", "eta ?", "eta 00:38", "eta 01:15"]


def test_an_evaluation_is_missing_unless_its_numbers_are_at_the_step_of_the_resume(tmp_path: Path):
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=8, tensorboard=False)
    assert writer.without(["first", "second"]) == ["first", "second"]
    writer.write(4, {"eval/first/top1": 0.5})
    writer.write(8, {"eval/second/top1": 0.5})
    writer.close()
    for resume_step, missing in ((8, ["first"]), (4, ["second"])):
        writer = MetricsWriter(tmp_path, resume_step=resume_step, total_steps=8, tensorboard=False)
        assert writer.without(["first", "second"]) == missing
        writer.close()


def test_the_console_says_when_a_verdict_changes_and_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    expect = ExpectConfig(source="here", bands={"train/loss": ((0, 0.0, 1.0), (20, 0.0, 1.0))})
    for resume_step, losses in ((0, (0.5, 0.5, 3.0, 3.0)), (2, (0.5, 0.5, 2.0))):
        writer = MetricsWriter(
            tmp_path, resume_step=resume_step, total_steps=9, tensorboard=False, expect=expect
        )
        for step, loss in enumerate(losses, start=resume_step + 1):
            writer.write(step, {"train/loss": loss})
        writer.conclude()
        writer.close()
    assert [line for line in caplog.messages if line.startswith("train/loss: ")] == [
        "train/loss: on track, 0.5 at step 1 (expected 0 to 1)",
        "train/loss: 2 above the band since step 3, 3 at step 3 (expected 0 to 1)",
        "train/loss: 2 above the band since step 3, 3 at step 4 (expected 0 to 1)",
        # The rows past step 2 are dropped, and so is what was said of them.
        "train/loss: 1 above the band since step 5, 2 at step 5 (expected 0 to 1)",
        "train/loss: 1 above the band since step 5, 2 at step 5 (expected 0 to 1)",
    ]
