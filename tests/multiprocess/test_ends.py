"""However a job is ended, by whatever launcher, it saves or says why, and nothing lives on."""

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from multiprocess.ends import Case, End, end_of, read_status
from multiprocess.job import Job, wait_until
from multiprocess.ranks import Fail, NotFinite, OutOfMemory, SlowSave, SlowToClose, Stop
from multiprocess.zygote import Zygote

from vitscale import command
from vitscale.errors import DataError, RankLost, Told
from vitscale.guard import ending
from vitscale.guard.ending import Ending
from vitscale.train import conclude

TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
TARGETS = {
    "python": ("command", "group", "worker"),
    "torchrun": ("command", "group", "rank 0", "rank 1", "worker"),
    "deepspeed": ("command", "group", "launch.py", "rank 0", "rank 1", "worker"),
}
TABLE = [
    Case(launcher, number, target)
    for launcher, targets in TARGETS.items()
    for number in (TERM, INT, USR1, KILL)
    for target in targets
    if target != "worker" or number == KILL  # a worker passes over every other signal
]
SAMPLE = [
    Case("python", INT, "group"),
    Case("python", KILL, "worker"),
    Case("torchrun", KILL, "command"),
    Case("deepspeed", TERM, "rank 1"),
    Case("deepspeed", KILL, "rank 1"),
]


def test_a_job_saves_or_says_why_and_leaves_nothing(
    tmp_path: Path, index: Path, uninterrupted: Job, sweep: bool
) -> None:
    losses: list[list[float]] = []
    for number, case in enumerate(TABLE if sweep else SAMPLE):
        job = Job(tmp_path / str(number), index)
        end = end_of(case, job)
        print(f"{case!s:38} {end}")
        assert not end.left, f"{case}: {end}"
        assert end.seconds < 15, f"{case}: {end}"
        check(case, end, job)
        assert job.column("data/digest")[:20] == uninterrupted.column("data/digest"), case  # the same data
        losses.append(job.column("train/loss")[:20])
        assert losses[-1] == pytest.approx(losses[0], abs=1e-5), case  # and the same training


def check(case: Case, end: End, job: Job) -> None:
    everything = case.signal == KILL and (case.launcher, case.target) in (
        ("python", "command"),
        ("python", "group"),
        ("deepspeed", "group"),
    )
    if everything:  # nobody is left to say anything
        assert end.run["state"] == "running", end
    elif case.signal == KILL and case.target in ("rank 0", "rank 1", "worker"):
        assert end.run["state"] == "failed", end
        assert len(end.causes) == 1, end.causes
        what = "a data worker of rank" if case.target == "worker" else f"{case.target} (process"
        assert what in end.run["reason"] and end.run["reason"] in end.causes[0], end
        assert end.newest % 40 == 0
    else:
        assert end.run["state"] == "preempted" and end.run["reason"], end
        assert not end.causes, end.causes
        assert end.newest == end.logged == end.run["step"], end


def test_a_second_ctrl_c_ends_at_once_even_in_a_hanging_collective(tmp_path: Path, index: Path) -> None:
    job = Job(tmp_path, index)
    with job.ranks(2, "total_steps=1000000") as ranks:
        wait_until(job.reached(5), job.output, *ranks)
        ranks[1].send_signal(signal.SIGSTOP)  # rank 0 now waits for it in the next collective
        time.sleep(1)
        ranks[0].send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[0].wait(1)
        ranks[0].send_signal(signal.SIGINT)
        assert ranks[0].wait(2) == 130, job.output()
    assert "error: ended by a second Ctrl-C" in job.output()
    assert (read_status(job)["state"], read_status(job)["exit_status"]) == ("failed", 130)


def test_what_follows_on_other_ranks_from_a_failure_that_all_share_is_not_told(tmp_path: Path) -> None:
    error = DataError("a shard is gone")
    error.shared = True
    first, second = Ending(tmp_path, 20), Ending(tmp_path, 20)
    first.__enter__()
    second._token = first._token
    assert first.note(error).told_here
    assert not second.note(RankLost("rank 0 has ended")).told_here
    status = ending.read(tmp_path)
    assert status and status["reason"] == "a shard is gone"


def test_a_bug_does_not_cut_the_save_that_is_under_way(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job, event = Job(tmp_path, index), SlowSave(Fail(rank=0, batch=5))
    assert zygote.train(job, 1, "checkpoint.every_steps=4", event=event) == [1], job.output()
    assert list(job.checkpoints()) == [4] and "a bug" in job.output()


def test_the_death_of_a_rank_ends_one_that_does_not_communicate(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    with job.ranks(2, "total_steps=1000000", "log.every_steps=1") as ranks:
        wait_until(job.reached(5), job.output, *ranks)
        os.kill(ranks[0].pid, signal.SIGSTOP)  # both stand still, wherever they are
        ranks[1].kill()
        ranks[1].wait()
        os.kill(ranks[0].pid, signal.SIGCONT)
        assert ranks[0].wait(15) == 1, job.output()
    assert job.output().count("error: rank 1 (process") == 1, job.output()
    reason = read_status(job)["reason"]
    assert reason.startswith("rank 1 (process") and " has died: killed" in reason


def test_the_first_cause_is_told_once_by_the_rank_that_had_it(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """A bug on rank 1: rank 0 fails as it loses the connection, and says nothing."""
    job = Job(tmp_path, index)
    statuses = zygote.train(job, 2, event=Fail(rank=1, batch=4))
    assert all(statuses), job.output()
    assert job.output().count("Traceback") == 1 and "ZeroDivisionError" in job.output(), job.output()
    status = read_status(job)
    assert (status["state"], status["step"]) == ("failed", 3)
    assert status["reason"] == "ZeroDivisionError: a bug"
    assert zygote.train(job, 2) == [0, 0], job.output()
    assert (read_status(job)["state"], read_status(job)["step"]) == ("done", 20)


@pytest.mark.parametrize(
    ("where", "sentence", "way_out"),
    [
        (
            "step",
            "CUDA is out of memory with engine.micro_batch 2: by plan it needs ",
            "set engine.micro_batch = 1, the largest below it that fits by plan",
        ),
        (
            "start",
            "CUDA is out of memory at the start, while the model is made: ",
            "or more devices",
        ),
        (
            "evaluate",
            "test: CUDA is out of memory with evals.test.batch_size 8",
            "set evals.test.batch_size to 4, or lower",
        ),
    ],
)
def test_a_full_gpu_is_told_once_with_what_fits(
    tmp_path: Path, index: Path, zygote: Zygote, where: str, sentence: str, way_out: str
) -> None:
    job = Job(tmp_path, index)
    section = f"evals.test={{test='{index.parent}/train-*.tar', batch_size=8}}"
    assert 2 in zygote.train(job, 2, section, event=OutOfMemory(where))
    assert job.output().count("error: ") == 1 and "Traceback" not in job.output(), job.output()
    assert read_status(job)["reason"].startswith(sentence)
    assert way_out in job.output()


def test_the_status_of_a_disk_that_refuses_is_that_of_the_program(tmp_path: Path) -> None:
    def program() -> int:
        with Ending(tmp_path, 20):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(tmp_path / "metrics.jsonl"))

    assert command.run(program) == 2
    status = ending.read(tmp_path)
    assert status and (status["state"], status["exit_status"]) == ("failed", 2)


def test_a_failure_that_is_noted_is_told_where_closing_the_run_hangs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError), Ending(tmp_path, 20) as end:
        try:
            raise DataError("a shard is gone")
        except DataError as error:
            end.note(error)
            assert end.tell(RankLost("the job hangs"), "stacks") == 2  # as the watchdog does
            assert capsys.readouterr().err == "error: a shard is gone\n"
            raise
    status = ending.read(tmp_path)
    assert status and status["reason"] == "a shard is gone"


def test_a_late_rank_of_a_dead_start_leaves_the_status_of_the_next_one(tmp_path: Path) -> None:
    with pytest.raises(Told), Ending(tmp_path, 20):
        Ending(tmp_path, 20).__enter__()
        raise RankLost("rank 0 has died")
    status = ending.read(tmp_path)
    assert status and status["state"] == "running"


def test_a_failure_is_told_also_where_the_run_directory_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(DataError), Ending(run_dir, 20):
        shutil.rmtree(run_dir)
        raise DataError("a shard is gone")


@pytest.mark.parametrize(
    ("reasons", "touched", "state", "reason"),
    [
        (None, False, "done", ""),
        (None, True, "done", ""),  # the wish to end is fulfilled
        (["SIGUSR1 (rank 3)"], False, "preempted", "SIGUSR1 (rank 3)"),
        (["SIGUSR1 (rank 3)"], True, "stopped", "the file {}"),  # it came after the signal
    ],
)
def test_a_stop_file_counts_whenever_it_came_and_never_for_the_next_start(
    tmp_path: Path, caplog, reasons: list[str] | None, touched: bool, state: str, reason: str
) -> None:
    caplog.set_level("INFO", "vitscale.train")
    stop_file = tmp_path / "stop"
    with Ending(tmp_path, 20) as end:
        if touched:
            stop_file.touch()
        end.progress.step = 20
        conclude(end, stop_file, reasons)
    status = ending.read(tmp_path)
    assert status and (status["state"], status["reason"]) == (state, reason.format(stop_file))
    assert not stop_file.exists()
    assert ("all 20 steps are done" in caplog.text) == (state == "done")


def test_a_bug_is_told_without_the_secrets_of_urls(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Ending(tmp_path, 20):
        raise RuntimeError("GET https://me:secret@host/a.tar?sig=secret")
    status = ending.read(tmp_path)
    assert status and status["reason"] == "RuntimeError: GET https://host/a.tar?***"
    assert not status["diverged"]


@pytest.mark.parametrize("slow", [0, 1])
def test_what_all_ranks_fail_with_is_the_cause_whichever_of_them_ends_first(
    tmp_path: Path, index: Path, zygote: Zygote, slow: int
) -> None:
    job = Job(tmp_path, index)
    at_once = ("guard.skipped_steps=2", "guard.rollbacks=0")
    event = SlowToClose(slow, NotFinite(rank=0, batches=range(2, 100)))
    assert zygote.train(job, 2, *at_once, event=event)[1 - slow] == 2, job.output()
    status = read_status(job)
    assert (status["state"], status["exit_status"]) == ("failed", 2), job.output()
    assert status["reason"].startswith("the run has diverged"), status


def test_a_start_that_is_refused_is_noted_in_a_run_that_is_not_done(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    away = index.with_name("away.json")
    assert zygote.train(job, 1, event=Stop()) == [75], job.output()
    assert read_status(job)["reason"] == "SIGTERM (rank 0)"
    index.rename(away)
    try:
        assert zygote.train(job, 1) == [2]
        assert read_status(job)["state"] == "failed" and str(index) in read_status(job)["reason"]
        step = read_status(job)["step"]
        assert step == max(job.checkpoints())
    finally:
        away.rename(index)
    assert zygote.train(job, 1) == [0], job.output()
    index.rename(away)
    try:
        assert zygote.train(job, 1) == [2]
        assert read_status(job)["state"] == "done"
    finally:
        away.rename(index)


def test_a_start_of_another_experiment_is_noted_so_that_no_script_repeats_it(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, event=Stop()) == [75], job.output()
    assert read_status(job)["exit_status"] == 75
    assert zygote.train(job, 1, "seed=8") == [2], job.output()
    status = read_status(job)
    assert (status["state"], status["exit_status"]) == ("failed", 2)
    assert "holds another experiment" in status["reason"]
    assert zygote.train(job, 1) == [0], job.output()
    assert read_status(job)["exit_status"] == 0
