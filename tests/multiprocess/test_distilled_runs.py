"""Distillation as a run: on any layout, resumed with its own teacher alone, and fine-tuned."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.ranks import HasTimm, KillAll
from multiprocess.zygote import Zygote
from safetensors.torch import save_file
from weights.foreign_models import import_timm, saved_model

from vitscale import load_model
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.store import Home, directory_of
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.convert import export_model

TEACHER = ViTConfig(variant="Ti/4", width=32, depth=1, num_heads=2, mlp_dim=32, image_size=8, num_classes=5)
DISTILLED = ("model.distilled=true", "model.representation_size=0", "augment.mixup=0.4")
SOFT = ("objective.target=soft", "objective.temperature=3", "objective.alpha=0.7")


def by(teacher: Path | str, *options: str) -> tuple[str, ...]:
    return ("objective.kind=distillation", f"objective.teacher={teacher}", *DISTILLED, *options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    saved_model(path, TEACHER)
    return path


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, index: Path, zygote: Zygote, teacher: Path) -> Job:
    """20 steps on one rank at ZeRO 1, hard, evaluated at the end."""
    job = Job(tmp_path_factory.mktemp("distilled"), index)
    top = f"evals.top={{test='{index}', every_steps=10}}"
    assert zygote.train(job, 1, *by(teacher, top)) == [0], job.output()
    return job


def test_a_run_learns_as_plain_pytorch_does(distilled: Job, teacher: Path) -> None:
    losses = distilled.column("train/loss")
    assert losses[0] == pytest.approx(np.log(5), abs=1e-5) and losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(plain_losses(distilled.config, *by(teacher)), abs=1e-5)
    model = load_model(distilled.run_dir)
    assert isinstance(model.config, ViTConfig) and model.config.distilled
    assert (model.head.weight - model.head_dist.weight).abs().max() > 1e-3
    assert model.dist_token.std() > 0


def test_a_run_is_resumed_elastically(
    tmp_path: Path, index: Path, zygote: Zygote, distilled: Job, teacher: Path
) -> None:
    killed = Job(tmp_path / "killed", index)
    moved = shutil.copy(teacher, tmp_path / "moved.safetensors")
    starts = [
        (2, teacher, ["engine.num_workers=1"], KillAll(batch=8), [-9, -9]),
        (1, moved, ["engine.zero_stage=3", "engine.micro_batch=4"], KillAll(batch=8), [-9]),
        (2, moved, ["engine.zero_stage=2", "engine.activation_checkpointing=full"], None, [0, 0]),
    ]
    for world_size, path, options, event, statuses in starts:
        ended = zygote.train(killed, world_size, *by(path), *options, event=event)
        assert ended == statuses, killed.output()
    assert killed.column("step") == list(range(1, 21))
    assert killed.column("data/digest") == distilled.column("data/digest")
    assert killed.column("train/loss") == pytest.approx(distilled.column("train/loss"), abs=2e-5)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, ["engine.activation_checkpointing=selective", "engine.micro_batch=0"]),
        (2, []),
        (3, ["engine.activation_checkpointing=full"]),
    ],
)
def test_soft_targets_train_at_every_stage(
    tmp_path: Path, index: Path, zygote: Zygote, teacher: Path, stage: int, options: list[str]
) -> None:
    job, common = Job(tmp_path, index), by(teacher, *SOFT, "total_steps=6")
    assert zygote.train(job, 2, *common, f"engine.zero_stage={stage}", *options) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(plain_losses(job.config, *common), rel=1e-4)


def test_a_student_without_the_token_learns_from_its_only_head(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """A ResNet is a teacher for images of any size, here in bf16 as the student."""
    config = ResNetConfig(width=32, stages=(1, 1), image_size=32, num_classes=5)
    saved_model(tmp_path / "resnet", config)
    npz = export_model(tmp_path / "resnet", tmp_path / "resnet.npz")
    alone = ("model.distilled=false", "objective.target=soft", "objective.alpha=1", "precision=bf16")
    job, options = Job(tmp_path / "job", index), by(npz, *alone)
    assert zygote.train(job, 1, *options, event=KillAll(batch=8)) == [-9], job.output()
    options = by(tmp_path / "resnet", *alone)  # the same weights
    assert zygote.train(job, 1, *options) == [0], job.output()
    losses = job.column("train/loss")
    assert losses[0] > 0 and losses[-1] < 0.9 * losses[0]


def test_a_regnet_of_timm_teaches_on_any_layout(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    """A network of the kind of DeiT's own teacher: timm's smallest, with random weights."""
    pytest.importorskip("huggingface_hub")
    regnet = import_timm().create_model("regnety_002", num_classes=5)
    save_file(regnet.state_dict(), tmp_path / "regnet.safetensors")
    job, weights = Job(tmp_path / "job", index), f"objective.teacher_weights={tmp_path}/regnet.safetensors"
    common = (*by("timm:regnety_002", weights, *SOFT), "model.image_size=32", "total_steps=6")
    assert zygote.train(job, 2, *common, event=HasTimm(KillAll(batch=5))) == [-9, -9], job.output()
    assert zygote.train(job, 1, *common, "engine.zero_stage=3", event=HasTimm()) == [0], job.output()
    assert job.column("train/loss") == pytest.approx(plain_losses(job.config, *common), abs=1e-5)


def test_a_checkpoint_knows_its_teacher_but_does_not_hold_it(distilled: Job) -> None:
    step, folder = next(Home(directory_of(distilled.run_dir)).committed())
    manifest = Manifest.load(folder)
    assert step == 20 and len(manifest.train.teacher) == 32
    assert set(manifest.tensors) == {name for name, _ in load_model(folder).named_parameters()}


def test_a_resume_with_another_teacher_is_refused_in_one_sentence(
    tmp_path: Path, index: Path, zygote: Zygote, teacher: Path
) -> None:
    job, path = Job(tmp_path / "job", index), tmp_path / "teacher.safetensors"
    shutil.copy(teacher, path)
    assert zygote.train(job, 2, *by(path), event=KillAll(batch=8)) == [-9, -9], job.output()
    saved_model(path, TEACHER, seed=1)
    assert zygote.train(job, 2, *by(path)) == [2, 2]
    assert "was distilled from another teacher, of digest" in job.output()
    assert zygote.train(job, 2, *by(path), "--dry-run")[0] == 2
    continued = (f"init.checkpoint={job.run_dir}", "init.full_state=true", f"run_dir={tmp_path}/new")
    assert zygote.train(job, 2, *by(path), *continued) == [0, 0], job.output()
    shutil.copy(teacher, path)
    assert zygote.train(job, 2, *by(path)) == [0, 0], job.output()
    assert job.output().count("Traceback") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, "has 7 classes, and model.num_classes is 5"),
        ({"image_size": 16}, "takes images of 16 px, and model.image_size is 8; fine-tune the teacher"),
        ({"num_classes": 0}, "has 0 classes"),
        (None, "nowhere"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, index: Path, zygote: Zygote, change: dict[str, int] | None, message: str
) -> None:
    job, path = Job(tmp_path / "job", index), tmp_path / ("teacher" if change else "nowhere")
    if change:
        saved_model(path, ViTConfig(**{**vars(TEACHER), **change}))
    for options in ((), ("--dry-run",)):
        assert zygote.train(job, 1, *by(path), *options) == [2]
        assert message in job.output() and "Traceback" not in job.output()
        job.log.unlink()
    assert not (job.run_dir / "config.toml").exists()


def test_a_fine_tuning_takes_both_heads_along_if_it_is_asked_to(
    tmp_path: Path, index: Path, zygote: Zygote, distilled: Job
) -> None:
    """With the mean of both heads as its logits, in larger images."""
    source = load_model(distilled.run_dir)
    job = Job(tmp_path / "job", index)
    options = (
        f"init.checkpoint={distilled.run_dir}",
        *DISTILLED[:2],
        "model.image_size=12",
        "total_steps=2",
        "schedule.warmup_steps=1",
        "optim.lr=1e-9",
    )
    assert zygote.train(job, 2, *options, "init.head=true", "engine.zero_stage=3") == [0, 0], job.output()
    assert abs(job.column("train/loss")[0] - np.log(5)) > 0.05  # not that of a head of zeros
    tuned = dict(load_model(job.run_dir).named_parameters())
    for name, param in source.named_parameters():
        if name != "pos_embed":
            assert torch.allclose(tuned[name], param, atol=1e-6), name
    assert torch.allclose(tuned["pos_embed"][:, :2], source.pos_embed[:, :2], atol=1e-6)
    anew = Job(tmp_path / "anew", index)
    assert zygote.train(anew, 1, *options) == [0], anew.output()
    assert anew.column("train/loss")[0] == pytest.approx(np.log(5), abs=1e-5)
    for more in ((), ("--dry-run",)):
        other = (*options, "init.head=true", "model.num_classes=6", f"run_dir={tmp_path}/other", *more)
        assert zygote.train(job, 1, *other) == [2]
        assert "whose head init.head takes along, has 5" in job.output()
        job.log.unlink()
