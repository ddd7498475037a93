"""Whether a run is started again, by its status.json and how far its last starts came."""

import dataclasses
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from data.servers import use_s3
from make import state_of, write_step

from launch import ended
from vitscale import config as configs
from vitscale.cluster import restarts
from vitscale.cluster.restarts import Vain, decide
from vitscale.errors import BusyError
from vitscale.guard import ending
from vitscale.run_dir import history
from vitscale.run_dir.lock import RunLock
from vitscale.stores import attempts
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]

PREEMPTED = {"state": "preempted", "total_steps": 9, "reason": "SIGTERM (rank 3)", "exit_status": 75}
LOST = {"state": "failed", "total_steps": 9, "reason": "rank 1 has died", "exit_status": 1}
MISTAKE = {"state": "failed", "total_steps": 9, "reason": "the index is gone", "exit_status": 2}
OLDER = {"state": "failed", "total_steps": 9, "reason": "rank 1 has died"}
STOPPED = {"state": "stopped", "total_steps": 9, "reason": "the file run/stop", "exit_status": 75}
RUNNING = {"state": "running", "total_steps": 9, "reason": "", "exit_status": None}
DONE = {"state": "done", "total_steps": 9, "reason": "", "exit_status": 0}


@pytest.mark.parametrize(
    ("status", "launcher", "vain", "kind", "reason"),
    [
        (DONE, 1, 9, "done", "all 9 steps are done"),
        (PREEMPTED, 0, 1, "again", "preempted: SIGTERM (rank 3)"),
        (STOPPED, 75, 0, "stop", "the file run/stop asked it to; the same command continues"),
        (RUNNING, 255, 1, "again", "running: it was killed"),
        (LOST, 247, 1, "again", "failed: rank 1 has died"),
        (MISTAKE, 1, 1, "stop", "the index is gone"),
        (OLDER, 1, 1, "stop", "rank 1 has died"),
        (PREEMPTED, 2, 1, "stop", "it was refused; the line above says why"),
        (LOST, 1, 5, "stop", "5 starts in a row brought no new checkpoint; the last one: rank 1 has died"),
        (PREEMPTED, 75, 5, "stop", "5 starts in a row brought no new checkpoint"),
        (None, 0, 0, "done", "the launcher ended with status 0"),
        (None, 2, 0, "stop", "it was refused"),
        (None, 1, 0, "again", "not begun: the launcher ended with status 1"),
        (None, None, 0, "again", "not begun: there is no status.json that can be read"),
    ],
)
def test_what_is_done_after_an_end(
    status: dict[str, Any] | None, launcher: int | None, vain: int, kind: str, reason: str
) -> None:
    decision = decide(status, launcher, vain, max_vain=5)
    assert decision.kind == kind and decision.reason.startswith(reason)


@pytest.mark.parametrize(
    ("launcher", "kind", "reason"),
    [
        (0, "again", "not begun: the launcher ended with status 0"),  # deepspeed's, after a kill
        (1, "again", "not begun: the launcher ended with status 1"),
        (2, "stop", "it was refused; the line above says why"),
    ],
)
@pytest.mark.parametrize("status", [DONE, MISTAKE, PREEMPTED, STOPPED, RUNNING])
def test_what_an_earlier_start_wrote_does_not_decide(
    status: dict[str, Any], launcher: int, kind: str, reason: str
) -> None:
    decision = decide(status, launcher, 1, max_vain=5, is_old=True)
    assert (decision.kind, decision.reason) == (kind, reason)


def test_starts_that_brought_no_checkpoint_are_counted() -> None:
    vain, counts = Vain(0), []
    for newest in (0, 0, 500, 500, None, 500, 700):  # None: the store does not answer
        vain = vain.and_one(newest)
        counts.append(vain.starts)
    assert counts == [1, 2, 0, 1, 2, 3, 0]


def test_the_count_lasts_from_one_process_to_the_next(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"  # the launcher failed before there was any
    assert [restarts.count(run_dir, 0).starts for _ in range(3)] == [1, 2, 3]
    assert restarts.count(run_dir, 0, adds=False).starts == 3  # another machine asks after the same start
    assert restarts.count(run_dir, 500).starts == 0 and restarts.count(run_dir, 500).starts == 1
    restarts.forget(run_dir)
    (run_dir / history.FILE_NAME).write_text('{"step": 0}\n{"step": 500}\n{"ste')
    assert restarts.count(run_dir, 500).starts == 1, "the last start began there"
    restarts.forget(run_dir)
    assert restarts.count(run_dir, 700).starts == 0


@pytest.mark.parametrize(
    "content",
    ['{"step": "x", "starts": null}', '{"step": 1e999, "starts": 1}', "[" * 100_000, b"\xff"],
    ids=["words", "infinity", "nested", "bytes"],
)
def test_a_damaged_count_begins_again_at_the_last_start(tmp_path: Path, content: str | bytes) -> None:
    line = content.encode() if isinstance(content, str) else content
    (tmp_path / restarts.FILE_NAME).write_bytes(line)
    (tmp_path / history.FILE_NAME).write_bytes(b'{"step": 500}\n' + line)
    assert restarts.count(tmp_path, 500).starts == 1


LATER = math.inf  # when a start began that came after all that these tests write


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a run that is done."""
    overrides = [f"run_dir={tmp_path}", "total_steps=9"]
    config = configs.load(TrainConfig, [ROOT / "configs/demo/shapes.toml"], overrides)
    (tmp_path / "config.toml").write_text(configs.to_toml(config))
    ending.write(tmp_path, "done", 9, 9, "")
    return config


@pytest.mark.parametrize("node", [0, 1])
def test_what_an_earlier_start_has_finished_is_done_unless_more_is_asked(
    config: TrainConfig, node: int
) -> None:
    assert restarts.after(config, 1, 5, since=LATER, node=node).kind == "done"
    longer = dataclasses.replace(config, total_steps=18)
    assert restarts.after(longer, 1, 5, since=LATER, node=node).kind == "again"
    written = ending.read(config.run_dir)
    assert written  # by a start that began in the same second
    assert restarts.after(longer, 1, 5, since=ending.written_at(written), node=node).kind == "done"


def test_a_start_is_counted_once_and_not_by_who_only_asks(config: TrainConfig) -> None:
    longer = dataclasses.replace(config, total_steps=18)

    def kinds(since: float = 0.0, node: int = 0) -> list[str]:
        return [restarts.after(longer, 1, 3, since=since, node=node).kind for _ in range(3)]

    assert kinds(since=LATER, node=1) == ["again"] * 3 and kinds() == ["done"] * 3
    assert kinds(since=LATER) == ["again", "again", "stop"]
    assert kinds(since=LATER) == ["again", "again", "stop"], "it was started by hand since"


def test_ranks_that_still_save_are_waited_for(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    longer, forked = dataclasses.replace(config, total_steps=18), multiprocessing.get_context("fork")
    ending.write(Path(config.run_dir), "running", 9, 18, "")
    holds, saves = forked.Event(), forked.Event()

    def rank() -> None:
        lock = RunLock(config.run_dir)
        holds.set()
        saves.wait(30)
        time.sleep(0.3)
        ending.write(Path(config.run_dir), "preempted", 10, 18, "the launcher is gone (rank 0)")
        lock.release()

    process = forked.Process(target=rank)
    process.start()
    assert holds.wait(30)
    with monkeypatch.context() as impatient, pytest.raises(BusyError, match="is in use by process"):
        impatient.setattr(restarts, "SAVING_SECONDS", 0.0)
        restarts.after(longer, -9, 5)
    saves.set()
    assert restarts.after(longer, -9, 5).reason == "preempted: the launcher is gone (rank 0)"
    process.join(30)


def test_the_newest_checkpoint_is_what_a_start_is_counted_by(config: TrainConfig) -> None:
    assert restarts.newest_step(config) == 0
    for step in (5, 9):
        write_step(Path(config.run_dir), step, state_of(step))
    assert restarts.newest_step(config) == 9


def test_after_a_start_whose_store_does_not_answer_it_counts_as_in_vain(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS", 1)
    use_s3(monkeypatch, 9)
    store = dataclasses.replace(config.checkpoint, store="s3://runs/a")
    away = dataclasses.replace(config, checkpoint=store, total_steps=18)
    assert restarts.newest_step(away) is None
    assert [restarts.after(away, 1, 2, since=LATER).kind for _ in range(2)] == ["again", "stop"]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"step": 9}', '{"state": "done", "step": 4, "total_steps": "4"}', None],
    ids=["torn", "list", "part", "text", "folder"],
)
def test_a_status_that_cannot_be_read_is_not_said_to_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    assert ending.read(tmp_path) is None and not caplog.messages
    path = tmp_path / ending.STATUS_NAME
    path.write_text(content) if content else path.mkdir()
    assert ending.read(tmp_path) is None
    (message,) = caplog.messages
    assert message.startswith(f"{path} cannot be read (")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-vain", "0", "must be at least 1"),
        ("--since", "nan", "must be seconds since 1970"),
        ("--since", "-1", "must be seconds since 1970"),
    ],
)
def test_counts_below_1_and_times_that_are_none_are_refused(
    capsys, option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        ended.main(["nowhere.toml", f"{option}={value}"])
    assert refused.value.code == 2 and f"{option} {value} {said}" in capsys.readouterr().err
