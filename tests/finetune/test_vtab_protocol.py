"""What the protocols of VTAB-1k make of a checkpoint."""

import dataclasses
from pathlib import Path

import pytest
from finetune.commands import ROOT

from vitscale import config as configs
from vitscale.data.transforms import AugmentConfig, ViewKey, choose_box
from vitscale.errors import ConfigError
from vitscale.finetune.grid import values_for
from vitscale.finetune.protocols import PROTOCOLS, finetuning_config
from vitscale.finetune.runs import keep_config
from vitscale.models import ModelConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.train_config import TrainConfig
from vitscale.vtab.tasks import TASKS


def vtab_config(model: ModelConfig, protocol: str = "paper", task: str = "smallnorb_azimuth") -> TrainConfig:
    """What a protocol makes of a checkpoint with this model."""
    values = finetuning_config(
        PROTOCOLS[protocol],
        PROTOCOLS[protocol].settings[0],
        TASKS[task],
        checkpoint="imported/bit",
        model=model,
        index="index.json",
        run_dir="run",
        seed=0,
        precision="fp32",
    )
    return configs.from_dict(TrainConfig, values)


def vtab_model(model: ModelConfig, protocol: str = "paper") -> ModelConfig:
    return vtab_config(model, protocol).model


def test_vtab_trains_a_new_head_with_the_dropout_of_its_protocol() -> None:
    assert vtab_model(ResNetConfig()) == ResNetConfig(image_size=384, num_classes=18)
    vit = ViTConfig(variant="B/16", representation_size=8, dropout=0.2, drop_path=0.1, head_bias=-1.0)
    assert vtab_model(vit) == ViTConfig(variant="B/16", image_size=384, num_classes=18, dropout=0.1)
    assert vtab_model(vit, "light") == ViTConfig(variant="B/16", image_size=224, num_classes=18)


def test_vtab_crops_and_flips_by_task_as_bits_appendix_f_says() -> None:
    """Neither for one task, no flip for two, no crop for four, and both for the other 12."""
    flip, crop = {"flip": True}, {"crop": "proportional", "crop_area": (36 / 49, 36 / 49)}
    plain = {"crop": "resize", "flip": False}
    no_flip, no_crop = {**plain, **crop}, {**plain, **flip}
    changes = dict.fromkeys(TASKS, AugmentConfig(**crop, **flip))
    changes |= dict.fromkeys(("dsprites_orientation", "smallnorb_azimuth"), AugmentConfig(**no_flip))
    changes |= dict.fromkeys(
        ("clevr_count", "clevr_distance", "dmlab", "kitti_distance"), AugmentConfig(**no_crop)
    )
    changes["dsprites_location"] = AugmentConfig(**plain)
    assert list(changes) == list(TASKS)
    for name, expected in changes.items():
        augment = vtab_config(ViTConfig(variant="B/16"), task=name).augment
        assert dataclasses.replace(augment, crop_area=expected.crop_area) == expected, name
        assert augment.crop_area == pytest.approx(expected.crop_area), name
        light = vtab_config(ViTConfig(variant="B/16"), "light", name).augment
        assert light == AugmentConfig(**plain), name
    box = choose_box(vtab_config(ViTConfig(variant="B/16"), task="pets").augment, ViewKey(0, 0, 0), 350, 490)
    assert box[2:] == (300, 420)  # 6 of 7 parts of each side


def test_scores_of_an_earlier_version_without_augmentation_are_not_mixed_with_new_ones(
    tmp_path: Path,
) -> None:
    config = vtab_config(ViTConfig(variant="B/16"), task="pets")
    keep_config(tmp_path, dataclasses.replace(config, augment=AugmentConfig(crop="resize", flip=False)))
    with pytest.raises(
        ConfigError, match=r"other settings \(augment.crop, augment.crop_area, augment.flip\)"
    ):
        keep_config(tmp_path, config)


def test_a_model_of_14_pixels_to_a_patch_is_tuned_at_378() -> None:
    model = ViTConfig(variant="H/14")
    recipe = configs.load(TrainConfig, [ROOT / "configs/finetune/cifar10_384.toml"])
    tuned = configs.from_dict(TrainConfig, values_for(recipe, "runs/vit_h14_jft", model)).model
    assert (tuned.image_size, vtab_model(model).image_size) == (378, 378)
