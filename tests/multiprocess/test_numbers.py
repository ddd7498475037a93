"""The engine computes what plain PyTorch computes, at every ZeRO stage and precision."""

import json
from pathlib import Path

import numpy as np
import pytest
from deepspeed.accelerator import get_accelerator
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.rank_runs import train_and_note
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote


def test_zero_1_equals_plain_pytorch(uninterrupted: Job) -> None:
    assert uninterrupted.column("train/loss") == pytest.approx(plain_losses(uninterrupted.config), abs=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_equal_zero_1(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, stage: int
) -> None:
    job = Job(tmp_path, index)
    options = (f"engine.zero_stage={stage}", "engine.activation_checkpointing=full")
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-6)


def test_a_row_has_the_mean_loss_since_the_row_before(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, "log.every_steps=4") == [0, 0], job.output()
    losses = uninterrupted.column("train/loss")
    ends = [row["step"] for row in job.rows()]
    assert ends == [1, 4, 8, 12, 16, 20]
    means = [np.mean(losses[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    assert job.column("train/loss_mean") == pytest.approx(means, abs=1e-6)


def test_what_a_run_prints_is_its_own(tmp_path: Path, index: Path) -> None:
    """DeepSpeed prints its memory in bf16 and warns of SGD; torch warns of its functions."""
    job = Job(tmp_path, index)
    sgd = ("optim.name=sgd", "optim.weight_decay=0")
    two_rows = ("total_steps=6", "log.every_steps=6")  # too few to name a rank that others slow down
    assert job.start(2, "precision=bf16", *two_rows, *sgd) == [0, 0], job.output()
    lines = job.output().splitlines()
    assert lines and all(line.startswith("INFO ") for line in lines), job.output()


@pytest.mark.parametrize("tf32", [False, True])
def test_a_step_computes_in_tf32_if_asked_and_collects_no_garbage(
    tmp_path: Path, index: Path, zygote: Zygote, tf32: bool
) -> None:
    """A CPU has the switches of TF32, too, and computes the same with them."""
    job, out = Job(tmp_path, index), tmp_path / "noted"
    options = (f"engine.tf32={str(tf32).lower()}", "total_steps=2", "schedule.warmup_steps=0")
    assert zygote.run(1, train_and_note, job.config, options, out, log=job.log) == [0], job.output()
    assert json.loads(out.read_text()) == [tf32, tf32, False]


def test_fp16_without_hardware_for_it_is_refused_in_one_sentence(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    if get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed trains in fp16 on this device")
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, "precision=fp16") == [2]
    assert 'precision "fp16" does not run on this device' in job.output()


def test_bf16_follows_fp32_and_resumes_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    whole = check_bit_for_bit_resume(tmp_path, index, zygote, "precision=bf16")
    assert whole.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=5e-3)


@pytest.mark.parametrize(("momentum", "lr"), [(0.9, 0.02), (0, 0.2)])
def test_sgd_resumes_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, momentum: float, lr: float
) -> None:
    overrides = ("optim.name=sgd", "optim.weight_decay=0", f"optim.lr={lr}", f"optim.momentum={momentum}")
    whole = check_bit_for_bit_resume(tmp_path, index, zygote, *overrides)
    assert min(whole.column("train/loss")) < whole.column("train/loss")[0] - 0.01


def check_bit_for_bit_resume(folder: Path, index: Path, zygote: Zygote, *overrides: str) -> Job:
    """A run that is killed and resumed has the losses of one that is not, which is returned."""
    whole, killed = Job(folder / "whole", index), Job(folder / "killed", index)
    assert zygote.train(whole, 1, *overrides) == [0], whole.output()
    assert zygote.train(killed, 1, *overrides, event=KillAll(batch=9)) == [-9], killed.output()
    assert zygote.train(killed, 1, *overrides) == [0], killed.output()
    assert killed.column("train/loss") == whole.column("train/loss")
    return whole
