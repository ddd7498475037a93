"""What a step minimises: classification written out, and however the global batch is cut."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import from_dict, to_dict
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives import build_objective
from vitscale.objectives.classification import ClassificationConfig
from vitscale.objectives.losses import LossConfig
from vitscale.objectives.mixup import mix
from vitscale.objectives.objective import BatchKey, Objective
from vitscale.train_config import TrainConfig

CLASSES, SIZE = 5, 8
AUGMENTS = {
    "none": AugmentConfig(),
    "mixup": AugmentConfig(mixup=0.4),
    "cutmix": AugmentConfig(cutmix=1.0),
    "both": AugmentConfig(mixup=0.4, cutmix=1.0, cutmix_share=0.3),
}


def batch(rows: int = 16) -> tuple[Tensor, Tensor]:
    """Random images, each with one label or two, padded with -1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.stack([torch.randperm(CLASSES, generator=generator)[:2] for _ in range(rows)])
    labels[::2, 1] = -1
    return images, labels


def forward(pixels: Tensor) -> Tensor:
    """A model in bf16: it casts its input itself and answers in its own dtype."""
    weight = torch.linspace(-0.3, 0.3, CLASSES * 3 * SIZE**2).reshape(CLASSES, -1).cos()
    return pixels.to(torch.bfloat16).flatten(1) @ weight.to(torch.bfloat16).T


def classification(augment: AugmentConfig, loss: str = "sigmoid") -> Objective:
    model = ViTConfig(num_classes=CLASSES)
    return build_objective(ClassificationConfig(), loss=LossConfig(name=loss), augment=augment, model=model)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_the_loss_is_that_of_the_operations_written_out(name: str, loss: str) -> None:
    (images, labels), augment = batch(), AUGMENTS[name]
    targets = torch.zeros(len(labels), CLASSES)
    for row, classes in enumerate(labels.tolist()):
        targets[row, [label for label in classes if label >= 0]] = 1.0
    pixels = (images.float() - 127.5) / 127.5
    kind = {"mixup": augment.mixup, "cutmix": augment.cutmix, "switch": augment.cutmix_share}
    pixels, targets = mix(pixels, targets, **kind, seed=3, step=9, first_position=32)
    logits = forward(pixels).float()
    if loss == "softmax":
        expected = -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()
    else:
        expected = (F.softplus(logits) - logits * targets).sum(-1).mean()
    actual = classification(augment, loss).loss(forward, images, labels, BatchKey(3, 9, 32))
    assert actual.dtype == torch.float32 and actual.shape == ()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("parts", [[8, 8], [4] * 4, [2] * 8, [6, 2, 8]])
def test_the_pairs_do_not_depend_on_how_the_batch_is_cut(name: str, parts: list[int]) -> None:
    (images, labels), objective = batch(), classification(AUGMENTS[name])
    seen: list[Tensor] = []

    def spy(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return forward(pixels)

    whole = objective.loss(spy, images, labels, BatchKey(3, 9, 0))
    total, first = torch.zeros(()), 0
    for rows in parts:
        rows_of_part = slice(first, first + rows)
        part = objective.loss(spy, images[rows_of_part], labels[rows_of_part], BatchKey(3, 9, first))
        total += part * rows / len(images)
        first += rows
    assert torch.equal(torch.cat(seen[1:]), seen[0])
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("changed", [BatchKey(4, 9, 0), BatchKey(3, 8, 0), BatchKey(3, 9, 2)])
def test_every_part_of_the_key_changes_what_is_mixed(changed: BatchKey) -> None:
    (images, labels), objective = batch(), classification(AUGMENTS["mixup"])
    loss = objective.loss(forward, images, labels, BatchKey(3, 9, 0))
    assert torch.equal(loss, objective.loss(forward, images, labels, BatchKey(3, 9, 0)))
    assert not torch.equal(loss, objective.loss(forward, images, labels, changed))


def test_a_config_without_an_objective_classifies() -> None:
    values = {"run_dir": "run", "total_steps": 1, "data": {"index": "index.json"}}
    config = from_dict(TrainConfig, values)
    assert config.objective == ClassificationConfig()
    assert dataclasses.asdict(config)["objective"] == {"kind": "classification"}
    assert from_dict(TrainConfig, to_dict(config)) == config
    wrong = values | {"objective": {"kind": "clasification"}}
    with pytest.raises(ConfigError, match='did you mean "classification"'):
        from_dict(TrainConfig, wrong)
