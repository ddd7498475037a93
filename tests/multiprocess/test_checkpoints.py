"""Saving while training goes on, averages, frozen parameters, other people's runs, full disks: with real
ranks.
"""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale import config as configs
from vitscale.checkpoint import store
from vitscale.checkpoint.format import Manifest
from vitscale.checkpoint.load import FragmentReader
from vitscale.job import TrainConfig
from vitscale.train import initial_model

TRAIN = "multiprocess.ranks:train"


def run(
    zygote: Zygote, world_size: int, job: Job, *overrides: str, function: str = TRAIN, before=()
) -> list[int]:
    return zygote.run(
        world_size, function, job.config, *before, *overrides, log=job.run_dir.parent / "rank-0.log"
    )


def checkpoints(job: Job) -> dict[int, Path]:
    directory = store.directory_of(job.run_dir)
    return {step: store.step_directory(directory, step) for step in store.steps_on_disk(directory)}


def whole(path: Path, state: str = "fp32") -> dict[str, torch.Tensor]:
    """A state of all tensors of a checkpoint."""
    manifest = store.verify(path)
    reader = FragmentReader(path, manifest)
    return {name: reader.whole(name, state) for name in manifest.tensors}


def test_saving_in_the_background_writes_the_same_bytes(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    jobs = [Job(tmp_path / name, index) for name in ("behind", "before")]
    options = ["checkpoint.every_steps=1", "checkpoint.keep_last=30", "optim.ema_decay=0.9", "precision=bf16"]
    assert run(zygote, 2, jobs[0], *options) == [0, 0], jobs[0].output()
    assert run(zygote, 2, jobs[1], *options, "checkpoint.background=false") == [0, 0], jobs[1].output()
    one, other = map(checkpoints, jobs)
    assert list(one) == list(other) == list(range(1, 21))
    for step in one:
        for name in Manifest.load(one[step]).files:
            assert (one[step] / name).read_bytes() == (other[step] / name).read_bytes()
    costs = [row for row in all_rows(jobs[0]) if "checkpoint/seconds" in row]
    assert len(costs) >= 10 and all(row["checkpoint/blocked_seconds"] >= 0 for row in costs)


def all_rows(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_that_fails_on_one_rank_ends_all_with_a_sentence_and_the_run_goes_on_later(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, background: str
) -> None:
    job = Job(tmp_path, index)
    options = [f"checkpoint.background={background}"]
    limited = "multiprocess.ranks:train_with_file_limit"
    assert run(zygote, 2, job, *options, function=limited, before=(1, 20_000)) == [2, 2], job.output()
    assert "saving " in job.output() and "rank-00001.safetensors failed: File too large" in job.output()
    assert "the last checkpoint is intact" in job.output() and "Traceback" not in job.output()
    assert not checkpoints(job) and not job.temporary_saves()
    assert 3 <= job.rows()[-1]["step"] <= 5, "the failure of the save at step 3 was noticed late"
    assert run(zygote, 2, job, *options) == [0, 0], job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_a_full_and_a_read_only_disk_leave_the_last_checkpoint_in_charge(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    job = Job(tmp_path, index)
    job.run_dir.mkdir()
    mount(job.run_dir, "size=700k")
    try:
        assert run(zygote, 2, job, "checkpoint.every_steps=1", "checkpoint.keep_last=50") == [2, 2], (
            job.output()
        )
        assert "failed: No space left on device (0.00 of 0.00 GB free there)" in job.output()
        kept = list(checkpoints(job))
        assert len(kept) >= 2 and not job.temporary_saves()
        mount(job.run_dir, "remount,ro")
        assert run(zygote, 2, job) == [2, 2]
        assert f"run_dir {job.run_dir} cannot be written: Read-only file system" in job.output()
        mount(job.run_dir, "remount,rw,size=20m")
        assert run(zygote, 2, job) == [0, 0], job.output()
        assert job.column("train/loss") == uninterrupted.column("train/loss")
    finally:
        subprocess.run(["umount", job.run_dir], check=True)


def mount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)


def test_a_second_job_in_the_run_directory_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    with job.ranks(1, "total_steps=100000") as (first,):
        while not job.reached(2)():
            assert first.poll() is None, job.output()
            time.sleep(0.01)
        assert run(zygote, 2, job, "total_steps=100000") == [2, 2]
        holder = f"is in use by process {first.pid} on {socket.gethostname()} since 20"
        assert holder in job.output() and "end that job first" in job.output()
        assert first.poll() is None, "the running job was disturbed"
        step = job.rows()[-1]["step"]
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert run(zygote, 1, job, "total_steps=100000", function="multiprocess.ranks:train_a_little") == [75]
    assert job.rows()[-1]["step"] >= step


def test_the_average_of_the_weights_is_what_one_process_would_compute(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """2 ranks at ZeRO 1, after a kill 1 rank at ZeRO 3: against a plain loop over the weights of every
    step.
    """
    job = Job(tmp_path, index)
    options = ["optim.ema_decay=0.8", "checkpoint.every_steps=1", "checkpoint.keep_last=30"]
    kill = "multiprocess.ranks:train_until_killed"
    assert -9 in run(zygote, 2, job, *options, function=kill, before=(0, 8, 40)), job.output()
    assert run(zygote, 1, job, *options, "engine.zero_stage=3") == [0], job.output()
    config = configs.load(TrainConfig, [job.config], options)
    average = {
        name: p.detach().clone() for name, p in initial_model(config, resumed=False).named_parameters()
    }
    assert len(checkpoints(job)) == 20
    for path in checkpoints(job).values():
        weights, saved = whole(path), whole(path, "ema")
        for name in average:
            average[name] = torch.lerp(average[name], weights[name], 1 - 0.8)
            assert torch.equal(average[name], saved[name]), f"{path}: {name}"


def test_frozen_parameters_stay_and_are_kept(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job, other = Job(tmp_path / "one", index), Job(tmp_path / "other", index)
    options = ['optim.freeze=["patch_embed.*", "blocks.0.*"]', "precision=bf16"]
    kill = "multiprocess.ranks:train_until_killed"
    assert -9 in run(zygote, 2, job, *options, function=kill, before=(1, 2, 30))
    assert run(zygote, 2, job, *options) == [0, 0], job.output()
    assert run(zygote, 2, other, *options) == [0, 0], other.output()
    assert job.column("train/loss") == other.column("train/loss")
    path = checkpoints(job)[20]
    manifest, weights = store.verify(path), whole(path)
    fixed = {name for name, tensor in manifest.tensors.items() if tensor.fixed}
    assert fixed == {name for name in weights if name.startswith(("patch_embed.", "blocks.0."))}
    config = configs.load(TrainConfig, [job.config], options)
    for name, param in initial_model(config, resumed=False).named_parameters():
        assert torch.equal(weights[name], param.detach().bfloat16().float()) == (name in fixed), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('optim.freeze=["nothing.*"]', "matches no parameter; they are named like cls_token"),
        ('optim.freeze=["*"]', "leaves nothing to train"),
        ("optim.ema_decay=1", "must lie in [0, 1)"),
        ("init.full_state=true", "needs init.checkpoint"),
        ('checkpoint.store="/somewhere"', "is not a prefix of an object store"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, index: Path, zygote: Zygote, override: str, message: str
) -> None:
    job = Job(tmp_path, index)
    assert run(zygote, 1, job, override) == [2]
    assert message in job.output() and "Traceback" not in job.output()


def test_a_new_run_goes_on_from_the_full_state_of_another(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    first = Job(tmp_path / "first", index)
    assert run(zygote, 2, first, function="multiprocess.ranks:train_a_little") == [75, 75], first.output()
    stopped = first.rows()[-1]["step"]
    options = [f"init.checkpoint={first.run_dir}", "init.full_state=true"]
    same, other = Job(tmp_path / "same", index), Job(tmp_path / "other", index)
    assert run(zygote, 2, same, *options) == [0, 0], same.output()
    assert same.column("step") == list(range(stopped + 1, 21))
    assert same.column("train/loss") == uninterrupted.column("train/loss")[stopped:]
    # The learning rate is the config's, whatever the saved run had; the moments are the saved ones.
    assert run(zygote, 1, other, *options, "optim.lr=1e-3") == [0], other.output()
    was, now = uninterrupted.column("train/lr")[stopped:], other.column("train/lr")
    assert now == pytest.approx([lr / 5 for lr in was])
    assert other.rows()[0]["train/loss"] == pytest.approx(
        uninterrupted.rows()[stopped]["train/loss"], abs=1e-6
    )
    assert run(
        zygote, 1, Job(tmp_path / "sgd", index), *options, "optim.name=sgd", "optim.weight_decay=0"
    ) == [2]
    assert 'holds the state of optim.name = "adamw"' in Job(tmp_path / "sgd", index).output()
    done = Job(tmp_path / "done", index)
    assert run(zygote, 1, done, *options, f"total_steps={stopped}") == [2]
    assert f"has done all of the run's {stopped} steps; raise the total" in done.output()


@pytest.mark.parametrize(("there", "here"), [("blocks.0.*", ""), ("", "blocks.0.*")])
def test_the_full_state_of_other_parameters_is_refused(
    tmp_path: Path, index: Path, zygote: Zygote, there: str, here: str
) -> None:
    """Moments that are not there must not be made of what is."""
    first, second = Job(tmp_path / "first", index), Job(tmp_path / "second", index)
    freeze = [f'optim.freeze=["{pattern}"]' if pattern else "optim.freeze=[]" for pattern in (there, here)]
    assert run(zygote, 2, first, freeze[0], "total_steps=6") == [0, 0], first.output()
    options = [f"init.checkpoint={first.run_dir}", "init.full_state=true", "total_steps=9"]
    assert run(zygote, 1, second, *options, freeze[1]) == [2], second.output()
    assert "does not fit optim.freeze: blocks.0." in second.output(), second.output()
    assert "Traceback" not in second.output()


def test_what_does_not_verify_is_passed_over_and_never_counts_as_kept(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    options = ["checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    assert run(zygote, 2, job, *options, function="multiprocess.ranks:train_a_little") == [75, 75]
    found = checkpoints(job)
    newest = max(found)
    (found[newest] / "rank-00001.safetensors").unlink()
    future = found[newest].with_name(store.step_name(1000))
    found[newest].rename(future)  # a broken one that looks newer than all that will come
    assert run(zygote, 2, job, *options) == [0, 0], job.output()
    assert f"checkpoint passed over: {future}/rank-00001.safetensors is missing" in job.output()
    assert list(checkpoints(job)) == [18, 20, 1000]
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_ranks_that_share_no_disk_are_told_so_at_the_first_save(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    apart = "multiprocess.ranks:train_apart"
    assert run(zygote, 2, job, function=apart, before=(tmp_path / "node",)) == [2, 2]
    assert (
        "is not to be seen from rank 0: run_dir must be on a file system that all nodes share" in job.output()
    )
    assert not list(tmp_path.glob("node-*/checkpoints/*"))
