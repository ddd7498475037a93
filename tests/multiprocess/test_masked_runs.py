"""Masked patch prediction as a run: on any layout, resumed, evaluated, fine-tuned, exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale import load_model
from vitscale.metrics.rows import read_metrics
from vitscale.weights.export import export_safetensors

MASKED = (
    "objective.kind=masked_patches",
    "model.image_size=[12,20]",
    "model.num_classes=0",
    "model.representation_size=0",
    "model.num_patch_outputs=512",
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, index: Path, zygote: Zygote) -> Job:
    """20 steps on one rank at ZeRO 1, with few-shot and kNN evaluations."""
    job, shards = Job(tmp_path_factory.mktemp("masked"), index), index.parent / "train-*.tar"
    evals = (
        f"evals.few={{kind='fewshot', train='{shards}', test='{shards}', shots=[2], every_steps=10}}",
        f"evals.knn={{kind='knn', k=[10], train='{shards}', test='{shards}', every_steps=10}}",
    )
    assert zygote.train(job, 1, *MASKED, *evals) == [0], job.output()
    return job


def test_a_run_learns_as_plain_pytorch_does(pretrained: Job) -> None:
    losses = pretrained.column("train/loss")
    assert losses[0] == pytest.approx(np.log(512), abs=1e-5)
    assert losses[-1] < losses[0] - 0.3
    assert losses == pytest.approx(plain_losses(pretrained.config, *MASKED), abs=1e-5)


def test_a_run_is_resumed_elastically(tmp_path: Path, index: Path, zygote: Zygote, pretrained: Job) -> None:
    killed = Job(tmp_path / "killed", index)
    starts = [
        (2, ["engine.num_workers=1"], KillAll(batch=8), [-9, -9]),
        (1, ["engine.zero_stage=3"], KillAll(batch=8), [-9]),
        (2, ["engine.zero_stage=3", "engine.micro_batch=4"], None, [0, 0]),
    ]
    for world_size, options, event, statuses in starts:
        assert zygote.train(killed, world_size, *MASKED, *options, event=event) == statuses, killed.output()
    assert killed.column("step") == list(range(1, 21))
    assert killed.column("data/digest") == pretrained.column("data/digest")
    assert killed.column("train/loss") == pytest.approx(pretrained.column("train/loss"), abs=2e-5)


@pytest.mark.parametrize(("target", "outputs"), [("downsized_patch", 8192), ("regression", 48)])
def test_the_other_targets_train_at_zero_2(
    tmp_path: Path, index: Path, zygote: Zygote, target: str, outputs: int
) -> None:
    job = Job(tmp_path, index)
    options = (*MASKED, f"objective.target={target}", f"model.num_patch_outputs={outputs}")
    zero = ("engine.zero_stage=2", "engine.activation_checkpointing=full")
    assert zygote.train(job, 2, *options, *zero) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(plain_losses(job.config, *options), rel=1e-4)


def test_features_are_evaluated_during_the_run(pretrained: Job) -> None:
    rows = read_metrics(pretrained.run_dir / "metrics.jsonl")
    for key in ("eval/few/2shot", "eval/knn/10nn"):
        steps = [row["step"] for row in rows if any(name.startswith(key) for name in row)]
        assert steps == [0, 10, 20], sorted({name for row in rows for name in row})


@pytest.mark.parametrize("stage", [1, 3])
def test_a_fine_tuning_takes_the_backbone_alone(
    tmp_path: Path, index: Path, zygote: Zygote, pretrained: Job, stage: int
) -> None:
    exported = export_safetensors(pretrained.run_dir, tmp_path / "masked.safetensors")
    source = load_model(exported)
    assert source.mask_token.std() > 0 and source.patch_head.weight.abs().max() > 0
    assert source(torch.zeros(1, 3, 12, 20)).shape == (1, 16)  # features: it has no head
    job = Job(tmp_path / "job", index)
    options = (
        f"init.checkpoint={exported}",
        "model.image_size=[12,20]",
        "total_steps=2",
        "schedule.warmup_steps=1",
        "optim.lr=1e-9",
        f"engine.zero_stage={stage}",
    )
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    assert job.column("train/loss")[0] == pytest.approx(np.log(5), abs=1e-6)
    tuned = dict(load_model(job.run_dir).named_parameters())
    assert "mask_token" not in tuned and "patch_head.weight" not in tuned
    for name, param in source.named_parameters():
        if name in tuned:
            assert torch.allclose(tuned[name], param, atol=1e-6), name
