"""Fine-tuning and evaluation during training: the same loop with [init] and [evals]."""

from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess.job import Job
from multiprocess.zygote import Zygote
from safetensors.torch import load_file, save_file

from vitscale import load_model
from vitscale.evals import FewShotConfig, open_task
from vitscale.evals.adapters import FrozenModel
from vitscale.metrics.rows import read_metrics
from vitscale.models.posemb import resize_posemb
from vitscale.weights.export import export_safetensors
from vitscale.weights.files import Weights


@pytest.mark.parametrize("stage", [1, 3])
def test_a_pretrained_model_is_finetuned_at_another_resolution_and_evaluated_by_all_ranks(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, stage: int
) -> None:
    exported = export_safetensors(uninterrupted.run_dir, tmp_path / "pretrained.safetensors")
    shards = str(index.parent / "train-*.tar")
    job = Job(tmp_path / "job", index)
    overrides = (
        f"init.checkpoint={exported}",
        "model.image_size=12",
        "model.representation_size=0",
        "total_steps=3",
        "schedule.warmup_steps=1",
        "optim.name=sgd",
        "optim.weight_decay=0",
        "optim.lr=1e-9",  # the backbone after 3 steps is still what it was initialised with
        f"engine.zero_stage={stage}",
        f"evals.few={{kind='fewshot', train='{shards}', test='{shards}', shots=[2], every_steps=2}}",
        f"evals.top={{kind='classify', test='{shards}', every_steps=100}}",
    )
    assert zygote.train(job, 2, *overrides) == [0, 0], job.output()
    assert job.column("train/loss")[0] == pytest.approx(np.log(5), abs=1e-6)

    source, tuned = load_model(exported), load_model(job.run_dir)
    for name, param in tuned.named_parameters():
        if name not in ("pos_embed", "head.weight", "head.bias"):
            assert torch.allclose(param, source.get_parameter(name), atol=1e-6), name
    resized = resize_posemb(source.pos_embed, (2, 2), (3, 3))
    assert torch.allclose(tuned.pos_embed, resized, atol=1e-6)

    rows = read_metrics(job.run_dir / "metrics.jsonl")
    few = [(row["step"], row["eval/few/2shot"]) for row in rows if "eval/few/2shot" in row]
    top = [(row["step"], row["eval/top/top1"]) for row in rows if "eval/top/top1" in row]
    assert [step for step, _ in few] == [0, 2, 3] and [step for step, _ in top] == [0, 3]
    task = open_task("few", FewShotConfig(train=shards, test=shards, shots=(2,)), image_size=12)
    alone = task.run(FrozenModel(tuned, torch.device("cpu")))
    assert few[-1][1] == pytest.approx(alone["2shot"], abs=0.03)


def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_tensor(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    exported = export_safetensors(uninterrupted.run_dir, tmp_path / "pretrained.safetensors")
    weights = Weights(str(exported))
    metadata, tensors = weights.metadata, load_file(exported)
    tensors["blocks.1.mlp.fc1.bias"][3] = float("nan")
    save_file(tensors, exported, metadata)
    job = Job(tmp_path / "job", index)
    assert zygote.train(job, 2, f"init.checkpoint={exported}") == [2, 2], job.output()
    said = f"error: {exported}: blocks.1.mlp.fc1.bias has values that are not finite; take an"
    assert job.output().count("error: ") == 1 and said in job.output(), job.output()


def test_a_checkpoint_of_another_architecture_is_refused_by_the_key(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    options = (f"init.checkpoint={uninterrupted.run_dir}", "model.mlp_dim=64")
    assert zygote.train(job, 1, *options) == [2]
    assert "model.mlp_dim is 64, but the [init] checkpoint has 32; set model.mlp_dim = 32" in job.output()
    assert not job.checkpoints()
