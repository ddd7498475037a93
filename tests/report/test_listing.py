"""`list`: the checkpoints of a run, with metrics, damage and leftovers."""

import contextlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from checkpoint_tool import NOW, Capture, call, call_json
from data.servers import s3_server, use_s3
from make import damage, state_of, write_step

from vitscale.checkpoint.verify import check_all
from vitscale.report import listing


def test_the_list_has_a_row_for_each_step_with_its_metrics(run: Path) -> None:
    printed = listing.render(listing.list_run(str(run)), NOW)
    rows = {line.split()[0]: line for line in printed.splitlines() if re.match(r" *\d", line)}
    assert list(rows) == ["10", "20", "30"]
    assert re.search(r"\b80 .* 2 h .* 3 +1  fp32 +verified +loss 2.5000, cifar10/top1 0.25$", rows["10"])
    assert rows["20"].endswith("loss 1.7500 (step 18),") and "num_samples" not in printed
    assert "std" not in printed and "probe" not in printed
    assert rows["30"].endswith("verified, latest  loss nan (step 25)")
    assert "cifar10/10shot 0.4375" in printed and printed.count("latest") == 1
    assert max(map(len, printed.splitlines())) <= 120 + len(str(run))


def test_many_metrics_continue_below_their_row(run: Path) -> None:
    accuracies = {f"set{i}/accuracy": i / 100 for i in range(20)}
    with open(run / "metrics.jsonl", "w") as file:
        row = {"step": 20, **{f"eval/{name}": accuracy for name, accuracy in accuracies.items()}}
        file.write(json.dumps(row) + "\n")
    lines = listing.render(listing.list_run(str(run)), NOW).splitlines()[2:]
    assert max(map(len, lines)) <= 120
    start = lines[0].index("metrics")
    shown = [metric for line in lines[1:] for metric in line[start:].split(", ") if metric]
    assert [metric.rstrip(",") for metric in shown] == [
        f"{name} {accuracy:.4g}" for name, accuracy in accuracies.items()
    ]


def test_one_pass_over_the_rows_gives_the_metrics_of_every_step() -> None:
    rows = [{"step": 0, "eval/a": 0.1}]
    for step in range(10, 60, 10):
        rows += [{"step": step, "train/loss": 1 / step}, {"step": step - 5, "checkpoint/seconds": 1.0}]
        rows += [{"step": step, "eval/a": step}, {"step": step, "eval/b": 2 * step}] if step % 20 == 0 else []
    steps = [70, 0, 5, 20, 20, 33, 50, 60]
    assert listing.metrics_at(iter(rows), steps) == {
        0: ({"eval/a": 0.1}, 0),
        5: ({}, 0),
        20: ({"train/loss": 1 / 20, "eval/a": 20, "eval/b": 40}, 20),
        33: ({"train/loss": 1 / 30}, 30),
        50: ({"train/loss": 1 / 50}, 50),
        60: ({"train/loss": 1 / 50}, 50),
        70: ({"train/loss": 1 / 50}, 50),
    }


@pytest.mark.parametrize("fast", [False, True])
def test_damage_is_named_in_the_list_and_does_not_end_it(run: Path, capsys: Capture, fast: bool) -> None:
    folder = run / "checkpoints"
    damage(folder / "step-000000010" / "rank-00001.safetensors")
    (folder / "step-000000020" / "rank-00002.safetensors").unlink()
    (folder / "step-000000030" / "manifest.json").write_text("{}")
    options = ["--fast"] if fast else []
    status, out, err = call(capsys, "list", run, *options)
    assert status == 2 and "the newest checkpoint, step 30, is damaged, and " in err
    assert ("training would resume from step 10;" if fast else "no other verifies;") in err
    # A flipped bit, of step 10, shows only where the files are read.
    assert out.count("DAMAGED") == (2 if fast else 3)
    assert ("step 10: " in out) is not fast
    assert ("rank-00001.safetensors is damaged: its checksum does not match the manifest" in out) is not fast
    assert "step 20: " in out and "rank-00002.safetensors is missing" in out
    assert "step 30: " in out and "manifest.json is damaged" in out
    rows = call_json(capsys, "list", run, *options)["checkpoints"]
    assert call(capsys, "list", run, *options, "--json")[0] == 2
    assert rows[0]["num_bytes"] > 0 and (rows[2]["num_bytes"], rows[2]["facts"]) == (0, {})
    assert [row["state"] for row in rows] == ["not verified" if fast else "DAMAGED", "DAMAGED", "DAMAGED"]


def test_a_list_whose_newest_checkpoint_is_good_succeeds(run: Path, capsys: Capture) -> None:
    damage(run / "checkpoints" / "step-000000020" / "rank-00001.safetensors")
    status, out, err = call(capsys, "list", run)
    assert (status, out.count("DAMAGED"), err) == (0, 1, "")


def test_a_file_of_another_size_is_found_without_reading_it(run: Path) -> None:
    with open(run / "checkpoints" / "step-000000010" / "rank-00000.safetensors", "ab") as file:
        file.write(b"x")
    first = listing.list_run(str(run), checksums=False).checkpoints[0]
    assert first.status == "DAMAGED" and re.search(r"has [\d,]+ bytes, the manifest says", first.problem)


def test_checkpoints_that_are_deleted_while_they_are_checked_are_left_out(run: Path) -> None:
    (run / "checkpoints" / "step-000000020" / "rank-00002.safetensors").unlink()
    with at_a_call(inspect.unwrap(check_all), lambda: shutil.rmtree(run / "checkpoints" / "step-000000010")):
        rows = listing.list_run(str(run)).checkpoints
    assert [(row.step, row.status) for row in rows] == [(20, "DAMAGED"), (30, "verified")]


def test_of_a_run_that_replaces_all_its_checkpoints_meanwhile_the_new_ones_are_listed(run: Path) -> None:
    def save_and_delete() -> None:
        shutil.rmtree(run / "checkpoints")
        write_step(run, 40, state_of(40))

    with at_a_call(inspect.unwrap(check_all), save_and_delete):
        rows = listing.list_run(str(run)).checkpoints
    assert [(row.step, row.status) for row in rows] == [(40, "verified")]


def test_a_save_that_is_committed_while_it_is_looked_into_is_no_leftover(run: Path) -> None:
    leftover = run / "checkpoints" / ".tmp-step-000000040"
    leftover.mkdir()
    with at_a_call(Path.rglob, leftover.rmdir):
        assert not listing.list_run(str(run)).notes


@contextlib.contextmanager
def at_a_call(function: Callable[..., object], action: Callable[[], object]) -> Iterator[None]:
    """Do the action just before the first call of a function within the block."""

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is function.__code__:
            sys.setprofile(None)
            action()

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_leftovers_and_a_wrong_latest_are_mentioned(run: Path, capsys: Capture) -> None:
    leftover = run / "checkpoints" / ".tmp-step-000000040"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(bytes(2500))
    (run / "checkpoints" / "latest").write_text("step-000000020\n")
    out = call(capsys, "list", run)[1]
    assert ".tmp-step-000000040 (2.50 kB) is a save in progress" in out
    assert 'the file "latest" names step-000000020, but the newest here is step-000000030' in out
    values = call_json(capsys, "list", run)
    assert len(values["notes"]) == 2
    assert [row["latest"] for row in values["checkpoints"]] == [False, True, False]
    assert values["checkpoints"][2]["metrics"] == {"train/loss": "nan"}


def test_checkpoints_in_a_store_are_listed_and_compared(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    remote, local = tmp_path / "served" / "bucket" / "run", tmp_path / "run"
    for step in (10, 20):
        write_step(remote, step, state_of(step))
    (remote / "checkpoints" / "step-000000030").mkdir()
    (remote / "checkpoints" / "step-000000030" / "rank-00000.safetensors").write_bytes(b"without a manifest")
    same = write_step(local, 20, state_of(20))
    (local / "config.toml").write_text('[checkpoint]\nstore = "s3://bucket/run"\n')
    with s3_server(tmp_path / "served") as port:
        use_s3(monkeypatch, port)
        listed = call_json(capsys, "list", "s3://bucket/run")
        assert [(row["step"], row["state"]) for row in listed["checkpoints"]] == [
            (10, "verified"),
            (20, "verified"),
        ]
        assert [row["step"] for row in call_json(capsys, "list", local)["checkpoints"]] == [10, 20, 20]
        assert call(capsys, "diff", same, "s3://bucket/run", "--states")[0] == 0
        assert call(capsys, "show", "s3://bucket/run/checkpoints/step-000000010")[0] == 0
        damage(remote / "checkpoints" / "step-000000020" / "rank-00001.safetensors")
        assert call_json(capsys, "list", "s3://bucket/run")["checkpoints"][1]["state"] == "DAMAGED"
        assert "step-000000010" in call(capsys, "verify", "s3://bucket/run")[1]
