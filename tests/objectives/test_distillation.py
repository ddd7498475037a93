"""Distillation: its losses by hand, its objective written out, and what is refused."""

import dataclasses
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import from_dict, to_dict
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.job import expected_first_loss
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives import build_objective
from vitscale.objectives.distillation import DistillationConfig
from vitscale.objectives.losses import LossConfig, distillation_loss
from vitscale.objectives.mixup import mix
from vitscale.objectives.objective import BatchKey, Objective
from vitscale.train_config import TrainConfig

CLASSES, SIZE = 5, 8
AUGMENT = AugmentConfig(mixup=0.4, cutmix=1.0)


def test_the_losses_by_hand() -> None:
    """Two images of two classes; softmax(ln 3, 0) = (3/4, 1/4), softmax(0, 0) = (1/2, 1/2)."""
    student = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    hard = (-math.log(3 / 4) - math.log(1 / 2)) / 2  # the teacher's first classes are 0 and 1
    assert distillation_loss("hard", student, teacher).item() == pytest.approx(hard)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert distillation_loss("soft", student, teacher).item() == pytest.approx((first + second) / 4)
    warm = distillation_loss("soft", 2 * student, 2 * teacher, temperature=2.0).item()
    assert warm == pytest.approx(4 * (first + second) / 4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_that_of_deit_for_logits_of_16_bit(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 7, generator=generator).to(torch.bfloat16) for _ in range(2))
    p = (teacher.double() / temperature).softmax(1)
    q = (student.double() / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum() / student.numel()
    actual = distillation_loss("soft", student, teacher, temperature)
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss("soft", teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def batch(rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, CLASSES, (rows, 1), generator=generator)


def linear(pixels: Tensor, seed: int) -> Tensor:
    weight = torch.randn(CLASSES, 3 * SIZE**2, generator=torch.Generator().manual_seed(seed))
    return 0.1 * pixels.flatten(1) @ weight.T


def forward(pixels: Tensor, *, separate_heads: bool = False) -> Tensor:
    heads = torch.stack([linear(pixels, 1), linear(pixels, 2)], dim=1)  # [B, 2, C]
    return heads if separate_heads else heads[:, 0]


def distillation(distilled: bool, **values: object) -> Objective:
    return build_objective(
        DistillationConfig(teacher="t", **values),
        loss=LossConfig(label_smoothing=0.1),
        augment=AUGMENT,
        model=ViTConfig(num_classes=CLASSES, distilled=distilled),
        teacher=lambda pixels: linear(pixels, 3),
    )


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_the_objective_is_that_of_the_operations_written_out(
    distilled: bool, target: Literal["hard", "soft"]
) -> None:
    images, labels = batch()
    pixels, targets = mix(
        (images.float() - 127.5) / 127.5,
        F.one_hot(labels[:, 0], CLASSES).float(),
        mixup=0.4,
        cutmix=1.0,
        switch=AUGMENT.cutmix_share,
        seed=3,
        step=9,
        first_position=32,
    )
    first, second, teacher = (linear(pixels, seed) for seed in (1, 2, 3))
    smooth = 0.9 * targets + 0.1 / CLASSES
    base = -(smooth * first.log_softmax(1)).sum(1).mean()
    taught = second if distilled else first
    if target == "hard":
        rest, temperature = F.nll_loss(taught.log_softmax(1), teacher.argmax(1)), 1.0
    else:
        temperature = 2.0
        p, q = (teacher / 2).softmax(1), (taught / 2).softmax(1)
        rest = 4 * (p * (p.log() - q.log())).sum() / p.numel()
    objective = distillation(distilled, target=target, alpha=0.3, temperature=temperature)
    actual = objective.loss(forward, images, labels, BatchKey(3, 9, 32))
    assert actual.item() == pytest.approx((0.7 * base + 0.3 * rest).item(), rel=1e-5)


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("parts", [[8, 8], [4] * 4, [6, 2, 8]])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(target: str, parts: list[int]) -> None:
    (images, labels), objective = batch(), distillation(True, target=target)
    whole = objective.loss(forward, images, labels, BatchKey(3, 9, 0))
    total, first = 0.0, 0
    for rows in parts:
        part = slice(first, first + rows)
        total += objective.loss(forward, images[part], labels[part], BatchKey(3, 9, first)).item() * rows
        first += rows
    assert total / len(images) == pytest.approx(whole.item(), rel=1e-5)


VALUES = {
    "run_dir": "run",
    "total_steps": 1,
    "data": {"index": "index.json"},
    "model": {"distilled": True},
    "objective": {"kind": "distillation", "teacher": "runs/teacher"},
}


def test_a_config_is_deits_by_default_and_can_be_written_and_read() -> None:
    config = from_dict(TrainConfig, VALUES)
    assert config.objective == DistillationConfig(
        teacher="runs/teacher", target="hard", alpha=0.5, temperature=1.0
    )
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert expected_first_loss(config) == pytest.approx(math.log(1000))
    soft = dataclasses.replace(config.objective, target="soft")
    assert expected_first_loss(dataclasses.replace(config, objective=soft)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"teacher": ""}}, "objective.teacher is missing: name a run"),
        ({"objective": {"teacher": "timm:"}}, "objective.teacher is missing"),
        ({"objective": {"teacher_weights": "x.safetensors"}}, "teacher_weights is for a model of timm"),
        ({"objective": {"alpha": 0.0}}, r"objective.alpha 0.0 must lie in \(0, 1\]"),
        ({"objective": {"alpha": 1.5}}, r"objective.alpha 1.5 must lie in \(0, 1\]"),
        ({"objective": {"alpha": 1.0}}, "leaves the head of the class token untrained"),
        ({"objective": {"temperature": 0.0, "target": "soft"}}, "temperature 0.0 must be above 0"),
        ({"objective": {"temperature": 3.0}}, 'leave it out, or set objective.target = "soft"'),
        ({"model": {"num_classes": 0}}, "model.num_classes 0 leaves nothing"),
        ({"model": {"pool": "mean"}}, "so model.pool 'mean' must be 'token'"),
        ({"model": {"pool": "map"}}, "so model.pool 'map' must be 'token'"),
        ({"model": {"representation_size": 8}}, "so model.representation_size 8 must be 0"),
        ({"model": {"num_patch_outputs": 512}}, "makes a head on patches"),
        ({"loss": {"name": "sigmoid"}}, 'set loss.name = "softmax"'),
        ({"data": {"labels": "multi"}}, 'set data.labels = "single"'),
        ({"data": {"labels": "multi"}, "loss": {"name": "sigmoid"}}, 'set data.labels = "single"'),
        (
            {"objective": {"kind": "masked_patches"}, "model": {"num_classes": 0, "num_patch_outputs": 512}},
            "unknown key objective.teacher",
        ),
        ({"init": {"head": True}}, "init.head = true needs init.checkpoint"),
        ({"init": {"head": True, "full_state": True, "checkpoint": "x"}}, "full_state takes the head along"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    values = {**VALUES}
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


def test_masked_patches_have_no_teacher() -> None:
    model = {"num_classes": 0, "num_patch_outputs": 512}
    values = VALUES | {"objective": {"kind": "masked_patches"}, "model": model}
    assert from_dict(TrainConfig, values)
    with pytest.raises(ConfigError, match=r"model.distilled = true makes a token for a teacher"):
        from_dict(TrainConfig, values | {"model": model | {"distilled": True}})


def test_a_student_without_the_token_may_learn_from_the_teacher_alone() -> None:
    values = VALUES | {"model": {}, "objective": VALUES["objective"] | {"alpha": 1.0, "target": "soft"}}
    assert from_dict(TrainConfig, values)
    assert from_dict(TrainConfig, values | {"model": {"kind": "resnet"}})
