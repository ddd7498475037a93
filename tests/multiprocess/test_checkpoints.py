"""Checkpoints of real ranks: background saves, averages, frozen parameters, full disks."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import torch
from make import edit_manifest, verified
from multiprocess.job import Job
from multiprocess.rank_runs import train_apart
from multiprocess.ranks import FileLimit, Kill, Stop
from multiprocess.zygote import Zygote
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale import config as configs
from vitscale.checkpoint import store
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import Manifest
from vitscale.models import build_model
from vitscale.rng import derive_seed
from vitscale.train_config import TrainConfig
from vitscale.weights.saved import SavedModel


def tensors_of(folder: Path, state: str = "fp32") -> dict[str, torch.Tensor]:
    """A state of all tensors of a checkpoint, whole."""
    manifest = verified(folder)
    reader = FragmentReader(folder, manifest)
    return {name: reader.whole(name, state) for name in manifest.tensors}


def test_saving_in_the_background_writes_the_same_bytes(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    background, foreground = (Job(tmp_path / name, index) for name in ("background", "foreground"))
    options = ["checkpoint.every_steps=1", "checkpoint.keep_last=30", "optim.ema_decay=0.9", "precision=bf16"]
    assert zygote.train(background, 2, *options) == [0, 0], background.output()
    statuses = zygote.train(foreground, 2, *options, "checkpoint.background=false")
    assert statuses == [0, 0], foreground.output()
    assert list(background.checkpoints()) == list(foreground.checkpoints()) == list(range(1, 21))
    for step, folder in background.checkpoints().items():
        for name in Manifest.load(folder).files:
            assert (folder / name).read_bytes() == (foreground.checkpoints()[step] / name).read_bytes()
    rows = [json.loads(line) for line in (background.run_dir / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if "checkpoint/seconds" in row]
    assert [row["step"] for row in saves] == list(range(1, 21))
    assert all(row["checkpoint/blocked_seconds"] >= 0 for row in saves)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_that_fails_on_one_rank_ends_all_with_a_sentence_and_the_run_continues_later(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, background: str
) -> None:
    job = Job(tmp_path, index)
    option = f"checkpoint.background={background}"
    limit = FileLimit(rank=1, num_bytes=20_000)
    assert zygote.train(job, 2, option, event=limit) == [2, 2], job.output()
    assert "saving " in job.output() and "rank-00001.safetensors failed: File too large" in job.output()
    assert "the last checkpoint is intact" in job.output() and "Traceback" not in job.output()
    assert not job.checkpoints() and not job.temporary_saves()
    assert 3 <= job.rows()[-1]["step"] <= 5, "the failure of the save at step 3 was noticed late"
    assert zygote.train(job, 2, option) == [0, 0], job.output()
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
        often = "checkpoint.every_steps=1"
        assert zygote.train(job, 2, often, "checkpoint.keep_last=50") == [2, 2], job.output()
        refused = "kB free, and checkpoint.keep_last = 50, and one more, needs 3."
        assert refused in job.output() and not job.checkpoints()
        assert zygote.train(job, 1, often, "checkpoint.keep_last=50", "--dry-run") == [2]
        assert job.output().count(refused) == 2
        steps_kept_for_ever = ("checkpoint.keep_last=1", "checkpoint.keep_every_steps=1")
        assert zygote.train(job, 2, often, *steps_kept_for_ever) == [2, 2], job.output()
        assert "failed: No space left on device (" in job.output() and "kB free there)" in job.output()
        assert len(job.checkpoints()) >= 2 and not job.temporary_saves()
        mount(job.run_dir, "remount,ro")
        assert zygote.train(job, 2) == [2, 2]
        assert f"run_dir {job.run_dir} cannot be written: Read-only file system" in job.output()
        mount(job.run_dir, "remount,rw,size=20m")
        assert zygote.train(job, 2) == [0, 0], job.output()
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
        assert zygote.train(job, 2, "total_steps=100000") == [2, 2]
        holder = f"is in use by process {first.pid} on {socket.gethostname()} since 20"
        assert holder in job.output() and "end that job first" in job.output()
        assert first.poll() is None, "the running job was disturbed"
        step = job.rows()[-1]["step"]
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert zygote.train(job, 1, "total_steps=100000", event=Stop()) == [75], job.output()
    assert job.rows()[-1]["step"] >= step


def test_the_average_of_the_weights_is_what_one_process_would_compute(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """2 ranks at ZeRO 1, then 1 at ZeRO 3, compared with a loop over every step's weights."""
    job = Job(tmp_path, index)
    options = ["optim.ema_decay=0.8", "checkpoint.every_steps=1", "checkpoint.keep_last=30"]
    kill = Kill(rank=0, save=8, effect=40)
    assert zygote.train(job, 2, *options, event=kill)[0] == -9, job.output()
    assert zygote.train(job, 1, *options, "engine.zero_stage=3") == [0], job.output()
    config = configs.load(TrainConfig, [job.config], options)
    model = build_model(config.model, derive_seed(config.seed, "init"))
    average = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert len(job.checkpoints()) == 20
    for folder in job.checkpoints().values():
        weights, saved = tensors_of(folder), tensors_of(folder, "ema")
        for name in average:
            average[name] = torch.lerp(average[name], weights[name], 1 - 0.8)
            assert torch.equal(average[name], saved[name]), f"{folder}: {name}"


def test_frozen_parameters_stay_and_are_kept(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    whole, killed = Job(tmp_path / "whole", index), Job(tmp_path / "killed", index)
    options = ['optim.freeze=["patch_embed.*", "blocks.0.*"]', "precision=bf16"]
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    kill = Kill(rank=1, save=2, effect=30)
    assert zygote.train(killed, 2, *options, event=kill)[1] == -9, killed.output()
    assert zygote.train(killed, 2, *options) == [0, 0], killed.output()
    assert killed.column("train/loss") == whole.column("train/loss")
    folder = killed.checkpoints()[20]
    manifest, weights = verified(folder), tensors_of(folder)
    untrained = {name for name, tensor in manifest.tensors.items() if tensor.untrained}
    assert untrained == {name for name in weights if name.startswith(("patch_embed.", "blocks.0."))}
    config = configs.load(TrainConfig, [killed.config], options)
    model = build_model(config.model, derive_seed(config.seed, "init"))
    for name, param in model.named_parameters():
        assert torch.equal(weights[name], param.detach().bfloat16().float()) == (name in untrained), name


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
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, index: Path, zygote: Zygote, override: str, message: str
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, override) == [2]
    assert message in job.output() and "Traceback" not in job.output()


def test_a_new_run_continues_from_the_full_state_of_another(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    names = ("first", "same", "other", "larger", "sgd", "done")
    first, same, other, larger, sgd, done = (Job(tmp_path / name, index) for name in names)
    assert zygote.train(first, 2, event=Stop()) == [75, 75], first.output()
    stopped = first.rows()[-1]["step"]
    options = [f"init.checkpoint={first.run_dir}", "init.full_state=true"]
    edit_manifest(first.checkpoints()[stopped] / "manifest.json", lambda v: v["train"].update(rollbacks=2))
    assert zygote.train(same, 2, *options) == [0, 0], same.output()
    assert same.column("step") == list(range(stopped + 1, 21))
    assert same.column("train/loss") == uninterrupted.column("train/loss")[stopped:]
    assert Manifest.load(same.checkpoints()[20]).train.rollbacks == 0  # that it had itself
    # The learning rate is the config's, not the saved run's; the moments are the saved ones.
    ema = ("optim.ema_decay=0.5", f"checkpoint.keep_every_steps={stopped + 1}", "checkpoint.every_steps=1")
    assert zygote.train(other, 1, *options, "optim.lr=1e-3", *ema) == [0], other.output()
    # An average that the state has not begins at the weights.
    after = other.checkpoints()[stopped + 1]
    names = SavedModel(after).shapes
    begun, before, now = (
        {name: tensor.double() for name, tensor in SavedModel(folder, slot=slot).tensors()}
        for folder, slot in ((after, "ema"), (first.checkpoints()[stopped], "fp32"), (after, "fp32"))
    )
    for name in names:
        torch.testing.assert_close(begun[name], (before[name] + now[name]) / 2, rtol=0, atol=1e-6)
    expected = [lr / 5 for lr in uninterrupted.column("train/lr")[stopped:]]
    assert other.column("train/lr") == pytest.approx(expected)
    first_loss = uninterrupted.column("train/loss")[stopped]
    assert other.column("train/loss")[0] == pytest.approx(first_loss, abs=1e-6)
    few = ("global_batch=16", "log.tensorboard=true", "checkpoint.every_steps=1")
    for last in (stopped + 1, stopped + 2):  # a start and a resume
        assert zygote.train(larger, 1, *options, *few, f"total_steps={last}") == [0], larger.output()
    assert larger.column("samples_seen") == [8 * stopped + 16, 8 * stopped + 32]
    assert Manifest.load(larger.checkpoints()[stopped + 2]).train.samples_seen == 8 * stopped + 32
    events = EventAccumulator(str(larger.run_dir / "tensorboard")).Reload()
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"global_batch" in hparams
    assert zygote.train(sgd, 1, *options, "optim.name=sgd", "optim.weight_decay=0") == [2]
    assert 'holds the state of optim.name = "adamw"' in sgd.output()
    assert zygote.train(done, 1, *options, f"total_steps={stopped}") == [2]
    assert f"has done all of the run's {stopped} steps; raise the total" in done.output()


@pytest.mark.parametrize(("frozen_before", "frozen_now"), [("blocks.0.*", ""), ("", "blocks.0.*")])
def test_the_full_state_of_other_parameters_is_refused(
    tmp_path: Path, index: Path, zygote: Zygote, frozen_before: str, frozen_now: str
) -> None:
    """Moments that were not saved are not made up. With the same freeze, the run continues."""
    first, second = Job(tmp_path / "first", index), Job(tmp_path / "second", index)
    before, now = (
        f'optim.freeze=["{pattern}"]' if pattern else "optim.freeze=[]"
        for pattern in (frozen_before, frozen_now)
    )
    assert zygote.train(first, 2, before, "total_steps=6") == [0, 0], first.output()
    options = [f"init.checkpoint={first.run_dir}", "init.full_state=true", "total_steps=9"]
    assert zygote.train(second, 1, *options, now) == [2], second.output()
    assert "does not fit optim.freeze: blocks.0." in second.output(), second.output()
    assert "Traceback" not in second.output()
    assert zygote.train(second, 1, *options, before) == [0], second.output()


def test_a_checkpoint_that_does_not_verify_is_passed_over_and_never_counts_as_kept(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    options = ["checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    assert zygote.train(job, 2, *options, event=Stop()) == [75, 75], job.output()
    newest = list(job.checkpoints().values())[-1]
    future = newest.with_name(store.step_name(1000))
    newest.rename(future)  # by its name newer than all that the run will save
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    assert f"checkpoint passed over: {future} holds the manifest.json of step " in job.output()
    assert list(job.checkpoints()) == [18, 20, 1000]
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_a_run_of_a_newer_version_is_refused_by_the_file_and_the_key(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, "total_steps=6") == [0], job.output()
    config = job.run_dir / "config.toml"
    written = config.read_text()
    config.write_text(f"mood = 1\n{written}")
    assert zygote.train(job, 1) == [2]
    assert f"{config} cannot be read by this vitscale (0.1.0): unknown key mood" in job.output()
    assert f'another run_dir with [init] checkpoint = "{job.run_dir}", full_state = true' in job.output()
    config.write_text(written)
    edit_manifest(job.checkpoints()[6] / "manifest.json", lambda v: v["train"]["config"].update(mood=1))
    assert zygote.train(job, 1) == [2]
    assert f"{job.checkpoints()[6]} holds a config that this vitscale (0.1.0; it was" in job.output()
    assert "Traceback" not in job.output()


def test_a_run_that_began_with_what_is_refused_today_is_resumed(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    shutil.copytree(uninterrupted.run_dir, job.run_dir)
    config = job.run_dir / "config.toml"
    extra = "[engine.deepspeed_extra]"
    text = config.read_text().replace(extra, f"{extra}\nprescale_gradients = true")
    for key in ("clip_norm", "step_minutes", "spike_deviations"):
        text = re.sub(rf"\n{key} = .*", f"\n{key} = inf", text)
    config.write_text(text)
    values = tomllib.loads(config.read_text())
    edit_manifest(job.checkpoints()[20] / "manifest.json", lambda v: v["train"].update(config=values))
    options = ("total_steps=22", "--dry-run")
    assert zygote.train(job, 1, "optim.clip_norm=0", *options) == [0], job.output()
    assert zygote.train(job, 1, "optim.clip_norm=1", *options) == [2]
    assert "optim.clip_norm was 0.0, now 1.0; set them back" in job.output()


def test_ranks_that_share_no_disk_are_told_so_at_the_first_save(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    statuses = zygote.run(2, train_apart, job.config, tmp_path / "node", log=job.log)
    assert statuses == [2, 2], job.output()
    message = "is not visible to rank 0: run_dir must be on a file system that all nodes share"
    assert message in job.output()
    assert not list(tmp_path.glob("node-*/checkpoints/*"))
