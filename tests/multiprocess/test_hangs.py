"""A rank that hangs ends the job, which says who hangs where. Real ranks, really stopped."""

import json
import time
from pathlib import Path

import psutil
import pytest
from multiprocess.collectives import intrude
from multiprocess.ends import launched, ranks_of, read_status
from multiprocess.job import TIMEOUT_SECONDS, Job, wait_until
from multiprocess.ranks import Freeze, HungSave, Sleep, Stop, Suspend
from multiprocess.zygote import Zygote

# A step and its data may take 6 s each. A rank does not answer if it is not heard for 15.
LIMITS = ("guard.step_minutes=0.1", "guard.data_minutes=0.1", "total_steps=100000")


def test_a_rank_that_waits_for_ever_is_named_with_its_place(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 4, *LIMITS, event=Sleep(rank=1, batch=6)) == [1, 1, 1, 1], job.output()
    said = read_status(job)
    assert said["state"] == "failed" and job.output().count("error: ") == 1, job.output()
    assert "the job hangs: rank 1 (process " in said["reason"] and "'step' of step 6" in said["reason"]
    assert ", in fall_asleep; 3 other ranks wait, in " in said["reason"]
    assert "  ranks 0, 2-3: 5 steps done, in 'step'\n" in job.output()
    assert "  rank 1: 5 steps done, in 'step'\n" in job.output() and " fall_asleep\n" in job.output()
    assert "[c10d]" not in job.output(), job.output()  # the others have read that it is over
    # The same command resumes.
    assert zygote.train(job, 2, "total_steps=100000", event=Stop(batch=3)) == [75, 75], job.output()


def test_a_stopped_rank_0_is_named_with_what_the_kernel_says_and_is_ended(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    statuses = zygote.train(job, 4, *LIMITS, event=Freeze(rank=0, batch=5))
    assert statuses == [-9, 1, 1, 1], job.output()
    said = read_status(job)["reason"]
    assert "the job hangs: rank 0 (process " in said and "not answer; the kernel says: T (stopped)" in said
    assert job.output().count("error: ") == 1, job.output()


def test_a_job_that_was_suspended_for_longer_than_a_limit_goes_on(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    suspended = Suspend(rank=1, batch=5, seconds=8)
    assert zygote.train(job, 2, "guard.step_minutes=0.1", event=suspended) == [0, 0], job.output()


def test_a_file_server_that_hangs_neither_silences_nor_holds_the_job(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    short = ("guard.save_minutes=0.05", "total_steps=100000")
    assert zygote.train(job, 4, *short, event=HungSave(rank=1)) == [1, 1, 1, 1], job.output()
    # Its trainer only waits for the thread that writes.
    said = job.output()[job.output().index("error: ") :].partition(
        ", in stall; 3 other ranks wait, in all_reduce;"
    )
    assert "the job hangs: rank 1 (process " in said[0] and "'save' of step 6 for" in said[0], said


def test_a_rank_alone_ends_too(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, *LIMITS, event=Sleep(rank=0, batch=4)) == [1], job.output()
    assert "rank 0 (process " in read_status(job)["reason"] and ", in fall_asleep; the" in job.output()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_a_launcher_a_stopped_rank_ends_the_job(
    tmp_path: Path, index: Path, sweep: bool, launcher: str
) -> None:
    if launcher == "torchrun" and not sweep:
        pytest.skip("with --sweep: the default run does it under deepspeed")
    job = Job(tmp_path, index)
    # No saves: a rank that is stopped in one is waited for as long as a save may take.
    overrides = (*LIMITS, "engine.num_workers=1", "checkpoint.every_steps=100000")
    with launched(job, launcher, overrides=overrides) as command:
        wait_until(job.reached(5), job.output, command)
        processes = psutil.Process(command.pid).children(recursive=True)
        ranks_of([psutil.Process(command.pid), *processes])[1].suspend()
        began = time.monotonic()
        assert command.wait(TIMEOUT_SECONDS) != 0
        _, alive = psutil.wait_procs(processes, 20)
        assert not alive, [process.cmdline() for process in alive]
        print(f"{launcher}: {time.monotonic() - began:.1f} s from SIGSTOP to the end of all processes")
    said = read_status(job)["reason"]
    assert "the job hangs: rank 1 (process " in said and "not answer; the kernel says: T (stopped)" in said


def test_a_stranger_in_the_store_of_the_watchdog_neither_stops_nor_blinds_it(
    tmp_path: Path, zygote: Zygote
) -> None:
    log = tmp_path / "log"
    assert zygote.run(2, intrude, tmp_path, log, log=log) == [0, 0], log.read_text()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said == [{"asked": False, "alive": True}] * 2, log.read_text()
    assert 1 <= log.read_text().count("somebody else reaches the ports of this host") <= 2, log.read_text()
