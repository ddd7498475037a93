"""Adafactor and Muon are those of whole matrices, however ZeRO cuts them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from multiprocess import sliced
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from tools.checkpoint import main
from vitscale import load_model
from vitscale.checkpoint.manifest import MANIFEST, Manifest
from vitscale.optim.optimizers import OptimConfig

# Wide enough that the matrices of the blocks are factored, and no multiple of what ranks own.
MODEL = ("model.width=48", "model.mlp_dim=40", "optim.momentum=0.9", "optim.lr=2e-3")
LAYOUTS = [
    ("adafactor", 1, 1),
    ("adafactor", 2, 2),
    ("adafactor", 2, 3),
    ("muon", 1, 2),
    ("muon", 2, 1),
]
OPTIONS = ("optim.clip_norm=0.1", "optim.layer_decay=0.7", 'optim.freeze=["blocks.0.mlp.*"]')


@pytest.mark.parametrize(("name", "ranks", "stage"), LAYOUTS)
def test_every_layout_trains_as_a_plain_loop_does(
    tmp_path: Path, index: Path, zygote: Zygote, name: str, ranks: int, stage: int
) -> None:
    job = Job(tmp_path, index)
    options = (*MODEL, *OPTIONS, f"optim.name={name}", "total_steps=10")
    assert zygote.train(job, ranks, *options, f"engine.zero_stage={stage}") == [0] * ranks, job.output()
    seen: list[torch.nn.Module] = []
    losses = plain_losses(job.config, *options, look=seen.append)
    assert job.column("train/loss") == pytest.approx(losses, abs=1e-6)
    assert len(set(losses)) == 10
    ours = load_model(job.run_dir).state_dict()
    for param, expected in seen[0].state_dict().items():
        if param.endswith("qkv.bias"):
            continue  # a bias of k changes no loss: its gradients are rounding errors
        # A moment that is rounded to the other side in bf16 is a part in 256 of itself off.
        assert (ours[param] - expected).norm() <= 1e-4 * (1e-2 + expected.norm()), param


@pytest.mark.parametrize(("name", "stages"), [("adafactor", (1, 3, 2)), ("muon", (1, 2, 2))])
def test_other_world_sizes_and_zero_stages_continue_with_the_same_losses(
    tmp_path: Path, index: Path, zygote: Zygote, name: str, stages: tuple[int, ...]
) -> None:
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    options = (*MODEL, f"optim.name={name}", "total_steps=10")
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    first, second, third = ((*options, f"engine.zero_stage={stage}") for stage in stages)
    assert zygote.train(job, 2, *first, event=KillAll(batch=5)) == [-9, -9], job.output()
    assert zygote.train(job, 1, *second, event=KillAll(batch=5)) == [-9], job.output()
    assert zygote.train(job, 2, *third) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), abs=1e-5)
    assert len(job.rows()) == 10


@pytest.mark.parametrize(("name", "precision", "stage"), [("adafactor", "bf16", 3), ("muon", "fp32", 2)])
def test_the_same_layout_and_a_resharded_checkpoint_resume_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, name: str, precision: str, stage: int
) -> None:
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    options = [*MODEL, f"optim.name={name}", f"precision={precision}", f"engine.zero_stage={stage}"]
    options += ["total_steps=9", "checkpoint.keep_last=9"]
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    step = Path("checkpoints", "step-000000003")
    assert main(["reshard", str(whole.run_dir / step), str(job.run_dir / step), "--world", "3"]) == 0
    assert main(["diff", str(whole.run_dir / step), str(job.run_dir / step), "--states"]) == 0
    assert zygote.train(job, 2, *options, event=KillAll(batch=5)) == [-9, -9], job.output()
    assert zygote.train(job, 2, *options) == [0, 0], job.output()
    assert job.column("train/loss") == whole.column("train/loss")[3:]
    assert main(["diff", str(whole.run_dir), str(job.run_dir), "--states"]) == 0
    assert main(["show", str(job.run_dir)]) == 0


@pytest.mark.parametrize(
    ("name", "precision", "stage"),
    [("adafactor", "fp32", 3), ("adafactor", "bf16", 1), ("muon", "fp32", 2), ("muon", "bf16", 1)],
)
def test_a_step_that_is_not_finite_leaves_all_state_as_it_was(
    tmp_path: Path, zygote: Zygote, name: str, precision: str, stage: int
) -> None:
    result, log = tmp_path / "result", tmp_path / "log"
    config = OptimConfig(name=name, lr=1e-3)  # type: ignore[arg-type]
    statuses = zygote.run(2, sliced.skip, config, precision, stage, result, log=log)
    assert statuses == [0, 0], log.read_text()[-3000:]
    assert json.loads(result.read_text()) == [[False, True, False]] * 2


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_matrix_is_made_orthogonal_once_and_no_rank_does_it_all(
    tmp_path: Path, zygote: Zygote, ranks: int
) -> None:
    """Two blocks have q, k, v, the projection, and two layers of the MLP: 12 matrices."""
    result, log = tmp_path / "result", tmp_path / "log"
    assert zygote.run(ranks, sliced.count, result, log=log) == [0] * ranks, log.read_text()[-3000:]
    counts = json.loads(result.read_text())
    assert sum(counts) == 12 and max(counts) <= -(-12 // ranks) + 1


def test_moments_of_adafactor_can_be_offloaded(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    options = (*MODEL, "optim.name=adafactor", "total_steps=8")
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    disk = ("engine.offload_optimizer=true", f"engine.offload_folder={tmp_path}")
    assert zygote.train(job, 2, *options, *disk, event=KillAll(batch=5)) == [-9, -9], job.output()
    assert zygote.train(job, 2, *options, *disk) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), abs=1e-6)


def test_another_optimizer_cannot_resume_from_their_state(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    first, job = Job(tmp_path / "first", index), Job(tmp_path / "job", index)
    assert zygote.train(first, 1, "optim.name=adafactor", "total_steps=6") == [0], first.output()
    start = (f"init.checkpoint={first.run_dir}", "total_steps=8")
    assert zygote.train(job, 1, *start, "init.full_state=true") == [2]
    assert 'holds the state of optim.name = "adafactor", not of "adamw"' in job.output()
    assert zygote.train(job, 1, *start, "optim.name=muon") == [0], job.output()


def test_a_checkpoint_without_statistics_is_refused(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, "optim.name=adafactor", "total_steps=6") == [0], job.output()
    folder = job.checkpoints()[6]
    manifest = Manifest.load(folder)
    assert len(manifest.tensors) == 2 * len(manifest.of_model)
    dataclasses.replace(manifest, tensors=manifest.of_model).save(folder / MANIFEST)
    assert zygote.train(job, 1, "optim.name=adafactor", "total_steps=8") == [2]
    assert f"{folder} lacks the optimizer's exp_avg_sq/" in job.output()


@pytest.mark.parametrize("key", ["zero_stage=3", "offload_optimizer=true"])
def test_muon_is_refused_where_no_rank_has_whole_matrices(
    tmp_path: Path, index: Path, zygote: Zygote, key: str
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, "optim.name=muon", f"engine.{key}") == [2]
    assert f'optim.name = "muon" does not run with engine.{key.replace("=", " = ")}' in job.output()
    assert not job.run_dir.exists()
