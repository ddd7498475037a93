"""Masked patch prediction: its targets by hand, its loss written out, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.train import main
from vitscale.config import from_dict, to_dict
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.models.corruption import Corruption, draw_corruption
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives import build_objective
from vitscale.objectives.losses import LossConfig
from vitscale.objectives.masked_patches import MaskedPatchesConfig, patch_colors
from vitscale.objectives.objective import BatchKey, Objective
from vitscale.train_config import TrainConfig

SIZE, PATCH = 16, 8  # 2 x 2 patches
OUTPUTS = {"mean_color": 512, "downsized_patch": 8192, "regression": 192}


def objective(target: str, **values: float) -> Objective:
    config = MaskedPatchesConfig(target=target, **values)
    model = ViTConfig(variant=f"Ti/{PATCH}", image_size=SIZE, num_classes=0)
    return build_objective(config, loss=LossConfig(), augment=AugmentConfig(), model=model)


def batch(rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def prediction(pixels: Tensor, corruption: Corruption, outputs: int) -> Tensor:
    """Any function of the image and of the corrupted patches, in bf16 as a model may answer."""
    level = pixels.mean((1, 2, 3))[:, None, None] + corruption.corrupted[:, :, None]  # [B, k, 1]
    return (level * torch.linspace(-1, 1, outputs)).sin().to(torch.bfloat16)


def loss_of(target: str, images: Tensor, key: BatchKey, **values: float) -> Tensor:
    def forward(pixels: Tensor, *, corruption: Corruption | None = None) -> Tensor:
        assert corruption is not None
        return prediction(pixels, corruption, OUTPUTS[target])

    return objective(target, **values).loss(forward, images, torch.full((len(images), 1), -1), key)


def test_the_colour_of_a_patch_of_one_colour() -> None:
    """The bin is 8 * value / 255, rounded down, at most 7: 31 -> 0, 32 -> 1, 128 -> 4."""
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    colours = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (31, 32, 128), (1, 1): (255, 255, 255)}
    for (row, column), colour in colours.items():
        for channel, value in enumerate(colour):
            rows, columns = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
            images[0, channel, rows, columns] = value
    expected = [7, 7 * 8, 0 + 8 * 1 + 64 * 4, 511]
    assert patch_colors(images, PATCH, 1)[0, :, 0].tolist() == expected
    assert patch_colors(images, PATCH, 4)[0].tolist() == [[colour] * 16 for colour in expected]


def test_the_colours_of_a_mean_and_of_the_parts_of_a_patch() -> None:
    images = batch()
    for side in (1, 4):
        colours, cell = patch_colors(images, PATCH, side), PATCH // side
        for image in range(len(images)):
            for index in range(4 * side**2):
                patch, part = divmod(index, side**2)
                top = PATCH * (patch // 2) + cell * (part // side)
                left = PATCH * (patch % 2) + cell * (part % side)
                expected = 0
                for channel in range(3):
                    values = images[image, channel, top : top + cell, left : left + cell].flatten().tolist()
                    mean = sum(values) / len(values) / 255
                    expected += min(7, int(8 * mean)) * 8**channel
                assert colours[image, patch, part] == expected


@pytest.mark.parametrize("target", OUTPUTS)
def test_the_loss_is_the_mean_over_the_corrupted_patches_written_out(target: str) -> None:
    images, key = batch(), BatchKey(3, 9, 32)
    drawn = draw_corruption(
        4, 2, masked=0.8, replaced=0.1, seed=3, step=9, first_position=32, count=len(images)
    )
    pixels = (images.float() - 127.5) / 127.5
    outputs = prediction(pixels, drawn, OUTPUTS[target]).float()
    total, count = torch.zeros(()), 0
    for row, patches in enumerate(drawn.corrupted.tolist()):
        for place, patch in enumerate(patches):
            top, left = PATCH * (patch // 2), PATCH * (patch % 2)
            values = pixels[row, :, top : top + PATCH, left : left + PATCH]
            if target == "regression":
                terms = (outputs[row, place] - values.flatten()).square()  # channel, row, column
            else:
                side = 4 if target == "downsized_patch" else 1
                colours = patch_colors(images, PATCH, side)[row, patch]
                logits = outputs[row, place].reshape(side**2, 512)
                terms = -F.log_softmax(logits, dim=-1)[torch.arange(side**2), colours]
            total, count = total + terms.sum(), count + len(terms)
    loss = loss_of(target, images, key)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)


def test_patches_that_are_not_corrupted_do_not_count() -> None:
    images, key = batch(), BatchKey(0, 1, 0)
    drawn = draw_corruption(
        4, 2, masked=0.8, replaced=0.1, seed=0, step=1, first_position=0, count=len(images)
    )

    def loss(images: Tensor) -> Tensor:
        def forward(pixels: Tensor, *, corruption: Corruption | None = None) -> Tensor:
            return torch.linspace(-1, 1, 512).expand(len(pixels), 2, 512)

        return objective("mean_color").loss(forward, images, torch.full((len(images), 1), -1), key)

    def changed(patch: int) -> Tensor:
        top, left = PATCH * (patch // 2), PATCH * (patch % 2)
        others = images.clone()
        others[0, :, top : top + PATCH, left : left + PATCH] = 255
        return loss(others)

    for patch in range(4):
        corrupted = patch in drawn.corrupted[0].tolist()
        assert torch.equal(changed(patch), loss(images)) != corrupted


@pytest.mark.parametrize("target", OUTPUTS)
@pytest.mark.parametrize("parts", [[3, 3], [1] * 6, [4, 2]])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(target: str, parts: list[int]) -> None:
    images, total, first = batch(), 0.0, 0
    for rows in parts:
        part = loss_of(target, images[first : first + rows], BatchKey(3, 9, first))
        total += part.item() * rows / len(images)
        first += rows
    whole = loss_of(target, images, BatchKey(3, 9, 0))
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for other in (BatchKey(4, 9, 0), BatchKey(3, 8, 0), BatchKey(3, 9, 1)):
        assert not torch.equal(loss_of(target, images, other), whole)


@pytest.mark.parametrize(("share", "count"), [(0.5, 98), (0.15, 29), (1.0, 196), (0.001, 1)])
def test_how_many_patches_are_corrupted(share: float, count: int) -> None:
    assert MaskedPatchesConfig(corrupted=share).num_corrupted(196) == count


VALUES = {
    "run_dir": "run",
    "total_steps": 1,
    "data": {"index": "index.json"},
    "model": {"num_classes": 0, "num_patch_outputs": 512},
    "objective": {"kind": "masked_patches"},
}


def test_a_config_is_the_papers_by_default_and_can_be_written_and_read() -> None:
    config = from_dict(TrainConfig, VALUES)
    assert config.objective == MaskedPatchesConfig(
        target="mean_color", corrupted=0.5, masked=0.8, replaced=0.1
    )
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_patch_outputs": 0}}, "needs 512; set model.num_patch_outputs = 512"),
        (
            {"objective": {"target": "downsized_patch"}},
            "num_patch_outputs is 512, .* set model.num_patch_outputs = 8192",
        ),
        ({"objective": {"target": "regression"}}, "set model.num_patch_outputs = 768"),
        (
            {"model": {"variant": "H/14"}, "objective": {"target": "downsized_patch"}},
            "needs a patch size that is a multiple of 4, not 14",
        ),
        ({"model": {"num_classes": 1000}}, "model.num_classes 1000 .* set model.num_classes = 0"),
        ({"model": {"representation_size": 8}}, "set model.representation_size = 0"),
        ({"model": {"pool": "map"}}, 'model.pool = "map" is not trained'),
        ({"model": {"image_size": 16}}, "needs two patches or more"),
        ({"augment": {"mixup": 0.2}}, "augment.mixup mixes labels"),
        ({"augment": {"cutmix": 1.0}}, "augment.cutmix mixes labels"),
        ({"loss": {"label_smoothing": 0.1}}, r"\[loss\] is about labels"),
        (
            {"loss": {"name": "sigmoid"}, "data": {"labels": "multi"}},
            r"\[loss\] is about labels",
        ),
        ({"data": {"labels": "multi"}}, 'data.labels = "multi" is about labels'),
        ({"evals": {"top": {"kind": "classify", "test": "x"}}}, 'use kind = "fewshot" or "knn"'),
        ({"objective": {"corrupted": 0.0}}, r"objective.corrupted 0.0 must lie in \(0, 1\]"),
        ({"objective": {"masked": 0.8, "replaced": 0.3}}, "nor above 1 together"),
        ({"objective": {"kind": "classification"}, "model": {"num_classes": 5}}, "leave it out, or set"),
        (
            {"model": {"kind": "hybrid", "variant": "R+Ti/16", "image_size": 64, "patch_size": 32}},
            'needs model.kind = "vit": a model of another kind has no patches of pixels',
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    values = {**VALUES}
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


def test_a_dry_run_shows_the_first_loss_and_refuses_what_training_would(tmp_path, index, capsys) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'''
run_dir = "{tmp_path}/run"
global_batch = 8
total_steps = 4
[model]
variant = "Ti/4"
width = 16
depth = 1
num_heads = 2
mlp_dim = 16
image_size = 8
num_classes = 0
num_patch_outputs = 512
[objective]
kind = "masked_patches"
[data]
index = "{tmp_path}/shards/index.json"
''')
    assert main([str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert 'target = "mean_color"' in shown and "expected first loss     6.238325" in shown
    regression = ("objective.target=regression", "model.num_patch_outputs=48")
    assert main([str(path), "--dry-run", *regression]) == 0
    assert "expected first loss     depends on the pixels" in capsys.readouterr().out
    assert main([str(path), "--dry-run", "augment.mixup=0.2"]) == 2
    error = capsys.readouterr().err
    assert "augment.mixup mixes labels" in error and "Traceback" not in error
