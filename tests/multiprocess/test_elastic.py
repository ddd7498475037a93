"""Ranks are killed in mid-run; what comes after is what an uninterrupted run computes."""

import json
import os
import re
import time
from pathlib import Path

import psutil
import pytest
from multiprocess.job import TIMEOUT_SECONDS, Job
from multiprocess.rank_runs import note_seeds
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale.rendezvous import free_port

STEPS = list(range(1, 21))


def test_an_uninterrupted_run_logs_every_step_once_and_learns(uninterrupted: Job) -> None:
    assert uninterrupted.column("step") == STEPS
    losses = uninterrupted.column("train/loss")
    assert losses[0] == pytest.approx(1.6094379, abs=1e-6)
    assert min(losses) < losses[0] - 0.01
    assert uninterrupted.column("data/bad_samples") == [0] * 20


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_the_same_layout_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, workers: int
) -> None:
    """With workers by the real command, and ranks killed from outside, wherever they are."""
    job = Job(tmp_path, index)
    override = f"engine.num_workers={workers}"
    if workers:
        assert job.start(2, override, kill_when=job.reached(8)) == [-9, -9], job.output()
    else:
        assert zygote.train(job, 2, override, event=KillAll(batch=9)) == [-9, -9], job.output()
    assert len(job.rows()) < 20
    assert zygote.train(job, 2, override) == [0, 0], job.output()
    assert job.column("step") == STEPS
    for name in ("train/loss", "train/grad_norm", "train/lr", "data/digest"):
        assert job.column(name) == uninterrupted.column(name)
    assert same_files(job.checkpoints()[20], uninterrupted.checkpoints()[20])


def test_dropout_is_resumed_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    whole, killed = Job(tmp_path / "whole", index), Job(tmp_path / "killed", index)
    assert zygote.train(whole, 1, "model.dropout=0.1") == [0], whole.output()
    assert zygote.train(killed, 1, "model.dropout=0.1", event=KillAll(batch=12)) == [-9]
    assert zygote.train(killed, 1, "model.dropout=0.1") == [0], killed.output()
    assert killed.column("train/loss") == whole.column("train/loss")
    assert abs(whole.column("train/loss")[5] - uninterrupted.column("train/loss")[5]) > 1e-4


def test_each_forward_pass_has_a_dropout_mask_of_its_own(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    options = ("model.dropout=0.1", "total_steps=3", "schedule.warmup_steps=1")
    assert zygote.run(2, note_seeds, job.config, options, tmp_path, log=job.log) == [0, 0], job.output()
    seeds = [json.loads((tmp_path / f"seeds-{rank}.json").read_text()) for rank in range(2)]
    assert [len(of_rank) for of_rank in seeds] == [6, 6] and len({*seeds[0], *seeds[1]}) == 12


def test_other_world_sizes_and_zero_stages_continue_with_the_same_data_and_losses(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    """2 ranks at ZeRO 1, then 1 at ZeRO 3, then 2 at ZeRO 2: killed twice, converted never."""
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, event=KillAll(batch=8)) == [-9, -9], job.output()
    second = ("engine.zero_stage=3", "engine.num_workers=1")
    assert zygote.train(job, 1, *second, event=KillAll(batch=8)) == [-9], job.output()
    assert zygote.train(job, 2, "engine.zero_stage=2", "engine.micro_batch=4") == [0, 0], job.output()
    assert job.column("step") == STEPS
    assert job.column("data/digest") == uninterrupted.column("data/digest")
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-5)


def test_sigterm_saves_and_exits_75_and_the_same_command_continues(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    with job.ranks(2, "checkpoint.every_steps=0", "engine.num_workers=1") as ranks:
        while not job.reached(4)():
            assert all(rank.poll() is None for rank in ranks), job.output()
            time.sleep(0.005)
        # A scheduler signals one rank and its data workers; all ranks stop together.
        workers = [psutil.Process(rank.pid).children(recursive=True) for rank in ranks]
        for process in (*workers[1], ranks[1]):
            process.terminate()
        assert [rank.wait(TIMEOUT_SECONDS) for rank in ranks] == [75, 75], job.output()
    pids = [process.pid for process in (*ranks, *workers[0], *workers[1])]
    assert shared_memory_of(pids, job.port) == []
    (stopped,) = job.checkpoints()
    assert 4 <= stopped < 20 and job.column("step") == list(range(1, stopped + 1))
    assert zygote.train(job, 2) == [0, 0], job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def shared_memory_of(pids: list[int], port: int) -> list[str]:
    """What a job left in /dev/shm: torch's names have the process, DeepSpeed's the port."""
    prefixes = tuple(f"torch_{pid}_" for pid in pids)
    names = os.listdir("/dev/shm")
    return [name for name in names if name.startswith(prefixes) or re.match(f"deepspeed.*_{port}_", name)]


@pytest.mark.parametrize("name", ["torch_{pid}_865324406_1", "deepspeed_allreduce_buffer_0_127_{port}_1"])
def test_a_leftover_in_shared_memory_is_found(name: str) -> None:
    pid, port = os.getpid(), free_port()
    path = Path("/dev/shm", name.format(pid=pid, port=port))
    path.touch()
    try:
        assert shared_memory_of([pid], port) == [path.name]
    finally:
        path.unlink()
    assert shared_memory_of([pid], port) == []


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
