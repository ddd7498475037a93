"""Training, saving and resuming on a GPU, by the real command; skipped where there is none.

Attention's backward pass adds in any order on a GPU, so that two runs differ by rounding. What
does not depend on arithmetic is still compared exactly: the data, and restored values.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from multiprocess.job import TIMEOUT_SECONDS, Job
from multiprocess.zygote import PATH

from vitscale import distributed
from vitscale.bench.step import Case, Ours, StepBench
from vitscale.checkpoint.manifest import Manifest
from vitscale.models.vit_config import ViTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for CUDA and NCCL")

TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
LAYOUTS = [
    (precision, stage, compile)
    for precision in TOLERANCES
    for stage in (1, 2, 3)
    for compile in (False, True)
    if not (compile and stage == 3)
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Job:
    """The reference: the same run in fp32 on the CPU."""
    job = Job(tmp_path_factory.mktemp("cpu"), index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert job.start(1) == [0], job.output()
    return job


def kill_at_batch_12(job: Job, *overrides: str) -> None:
    """Run to a SIGKILL in batch 12, in a new process: a fork of the zygote cannot use a GPU.

    By then the save of step 10 has begun, and so that of step 5 is complete.
    """
    code = (
        "import sys; from multiprocess.ranks import KillAll, train; "
        "train(sys.argv[1], sys.argv[2:], KillAll(batch=12))"
    )
    command = [sys.executable, "-c", code, job.config, *overrides]
    path = f"{PATH}:{os.environ.get('PYTHONPATH', '')}"
    process = job.popen(command, {"PYTHONPATH": path, "OMP_NUM_THREADS": 1})
    try:
        assert process.wait(TIMEOUT_SECONDS) == -signal.SIGKILL, job.output()
    finally:
        process.kill()


@pytest.mark.parametrize(("precision", "stage", "compile"), LAYOUTS)
def test_a_run_that_is_killed_and_resumed_follows_the_one_on_the_cpu(
    tmp_path: Path, index: Path, on_cpu: Job, precision: str, stage: int, compile: bool
) -> None:
    job = Job(tmp_path, index)
    options = (
        f"precision={precision}",
        f"engine.zero_stage={stage}",
        f"engine.compile={str(compile).lower()}",
        "engine.num_workers=2",
        "checkpoint.every_steps=5",
    )
    kill_at_batch_12(job, *options)
    assert job.start(1, *options) == [0], job.output()
    assert "resumed from" in job.output()
    assert job.column("data/digest") == on_cpu.column("data/digest")
    tolerance = TOLERANCES[precision]
    assert job.column("train/loss") == pytest.approx(on_cpu.column("train/loss"), abs=tolerance)


def test_a_checkpoint_of_the_cpu_resumes_on_the_gpu_at_another_stage(
    tmp_path: Path, index: Path, on_cpu: Job
) -> None:
    job = Job(tmp_path, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        job.start(1, kill_when=lambda: 9 in job.checkpoints())
    assert job.start(1, "engine.zero_stage=3") == [0], job.output()
    assert job.column("data/digest") == on_cpu.column("data/digest")
    assert job.column("train/loss") == pytest.approx(on_cpu.column("train/loss"), abs=TOLERANCES["fp32"])


def test_fp16_saves_its_loss_scale(tmp_path: Path, index: Path) -> None:
    job = Job(tmp_path, index)
    assert job.start(1, "precision=fp16") == [0], job.output()
    manifest = Manifest.load(job.checkpoints()[20])
    assert manifest.loss_scaler["cur_scale"] > 1
    assert manifest.counters.skipped_steps < 20


@pytest.mark.parametrize(
    "options",
    [
        ("engine.offload_optimizer=true", "precision=bf16"),
        ("engine.activation_checkpointing=selective", "engine.compile=true", "precision=bf16"),
        ("engine.activation_checkpointing=full", "engine.zero_stage=3"),
        ("optim.ema_decay=0.9", "precision=bf16", "optim.freeze=[\"patch_embed.*\"]"),
        ("optim.name=sgd", "optim.weight_decay=0", "precision=bf16"),
        ("optim.name=adafactor", "engine.zero_stage=3", "precision=bf16"),
        ("optim.name=muon", "optim.momentum=0.95", "engine.zero_stage=2", "precision=bf16"),
        ("model.kind=hybrid", "model.variant=R50+Ti/16", "model.stem_width=32", "model.stem_stages=[1]",
         "model.patch_size=4", "engine.compile=true", "precision=bf16"),
        ("engine.tf32=true",),
    ],
    ids=lambda options: options[0],
)  # fmt: skip
def test_an_option_trains(tmp_path: Path, index: Path, options: tuple[str, ...]) -> None:
    job = Job(tmp_path, index)
    assert job.start(1, *options) == [0], job.output()
    losses = job.column("train/loss")
    assert len(losses) == 20 and min(losses) < losses[0]


def test_only_the_gradient_norm_is_waited_for() -> None:
    """DeepSpeed reads it to skip the step and to clip, in one file; nothing else is read."""
    distributed.initialize()
    config = StepBench(
        model=ViTConfig(variant="mu/16", image_size=32, num_classes=10),
        batch=8,
        cases=(case := Case(loop="vitscale"),),
    )
    trainee = Ours(config, case)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, device="cuda")
    labels = torch.randint(10, (8, 1), device="cuda")
    trainee.step(images, labels)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            trainee.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainee.close()
    places = [Path(wait.filename).parts[-3:] for wait in waits if "synchroniz" in str(wait.message)]
    assert set(places) == {("deepspeed", "runtime", "utils.py")}
    assert len(places) <= 4  # two more are for the constants that NaN and infinity are replaced by
