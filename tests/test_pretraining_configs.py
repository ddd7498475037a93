"""configs/pretrain/ beside the tables of their sources, row by row."""

from pathlib import Path
from typing import Any

import pytest

from vitscale import config as configs
from vitscale.train_config import TrainConfig

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
JFT_IMAGES, IMAGENET_IMAGES = 303_000_000, 1_281_167
TENSORFLOW = {"augment.crop": "tensorflow", "augment.crop_area": (0.05, 1.0)}

# The paper's Table 3: Adam with batches of 4,096 and a warmup of 10,000 steps, and clipping on
# ImageNet alone. A ViT has a tanh layer before the head (section 3.1), and none is in a ResNet.
PAPER = TENSORFLOW | {"global_batch": 4096, "schedule.warmup_steps": 10_000, "model.drop_path": 0.0}
WIDTH = {"b": 768, "l": 1024, "h": 1280}


def jft(lr: float, epochs: int) -> dict[str, Any]:
    return PAPER | {
        "optim.lr": lr,
        "schedule.decay": "linear",
        "optim.weight_decay": 0.1,
        "optim.clip_norm": 0.0,
        "model.dropout": 0.0,
        "total_samples": epochs * JFT_IMAGES,
    }


def vit_jft(size: str, lr: float, epochs: int) -> dict[str, Any]:
    return jft(lr, epochs) | {"model.representation_size": WIDTH[size]}


def in21k(size: str) -> dict[str, Any]:
    return PAPER | {
        "optim.lr": 1e-3,
        "schedule.decay": "linear",
        "optim.weight_decay": 0.03,
        "optim.clip_norm": 0.0,
        "model.dropout": 0.1,
        "total_epochs": 90,
        "model.representation_size": WIDTH[size],
    }


def imagenet(size: str) -> dict[str, Any]:
    return PAPER | {
        "optim.lr": 3e-3,
        "schedule.decay": "cosine",
        "optim.weight_decay": 0.3,
        "optim.clip_norm": 1.0,
        "model.dropout": 0.1,
        "total_epochs": 300,
        "model.representation_size": WIDTH[size],
    }


# Mixup and RandAugment by the names of big_vision configs/vit_i21k.py; None = no RandAugment.
AUGREG = {
    "none": (0.0, None),
    "light1": (0.0, 0.0),
    "medium1": (0.2, 15.0),
    "strong1": (0.5, 20.0),
}


def augreg(name: str, weight_decay: float = 0.1, regularization: float = 0.0) -> dict[str, Any]:
    """AugReg on ImageNet-21k: no tanh layer. regularization: dropout and stochastic depth."""
    mixup, magnitude = AUGREG[name]
    randaugment = {"augment.randaugment_ops": 2, "augment.randaugment_magnitude": magnitude}
    return TENSORFLOW | {
        "optim.lr": 1e-3,
        "schedule.decay": "cosine",
        "optim.weight_decay": weight_decay,
        "optim.clip_norm": 1.0,
        "model.dropout": regularization,
        "model.drop_path": regularization,
        "global_batch": 4096,
        "schedule.warmup_steps": 10_000,
        "total_epochs": 300,
        "model.representation_size": 0,
        "augment.mixup": mixup,
        "augment.randaugment": "none" if magnitude is None else "augreg",
        **({} if magnitude is None else randaugment),
    }


# facebookresearch/deit main.py: 5e-4 for 512 images and a warmup of 5 epochs, at batches of
# 1,024. The configs have batches of 1,056, so that each image can come three times.
DEIT = {
    "optim.lr": 1e-3,
    "schedule.decay": "cosine",
    "optim.weight_decay": 0.05,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.99996,
    "model.dropout": 0.0,
    "model.drop_path": 0.1,
    "model.gelu": "exact",
    "global_batch": 1056,
    "schedule.warmup_steps": 5 * IMAGENET_IMAGES // 1056,
    "total_samples": 300 * IMAGENET_IMAGES,
    "model.representation_size": 0,
    "augment.crop": "torchvision",
    "augment.crop_area": (0.08, 1.0),
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.random_erasing": 0.25,
    "augment.repeats": 3,
    "loss.label_smoothing": 0.1,
}

# The paper, appendix B.1.2.
MASKED = TENSORFLOW | {
    "optim.lr": 2e-4,
    "schedule.decay": "cosine",
    "schedule.warmup_steps": 10_000,
    "global_batch": 4096,
    "total_steps": 1_000_000,
}
# "Better plain ViT baselines" (big_vision configs/vit_s16_i1k.py).
BASELINE = TENSORFLOW | {
    "optim.lr": 1e-3,
    "schedule.decay": "cosine",
    "optim.weight_decay": 0.1,
    "optim.clip_norm": 1.0,
    "schedule.warmup_steps": 10_000,
    "global_batch": 1024,
    "total_epochs": 90,
    "model.representation_size": 384,
    "augment.mixup": 0.2,
    "augment.randaugment_magnitude": 10.0,
}

RECIPES: dict[str, dict[str, Any]] = {
    "vit_b16_jft": vit_jft("b", 8e-4, 7),
    "vit_b32_jft": vit_jft("b", 8e-4, 7),
    "vit_l32_jft": vit_jft("l", 6e-4, 7),
    "vit_l16_jft": vit_jft("l", 4e-4, 14),
    "vit_h14_jft": vit_jft("h", 3e-4, 14),
    "bit_r50x1_jft": jft(1e-3, 7),
    "bit_r50x2_jft": jft(1e-3, 7),
    "bit_r101x1_jft": jft(8e-4, 7),
    "bit_r152x1_jft": jft(6e-4, 7),
    "bit_r152x2_jft": jft(6e-4, 7),
    "bit_r200x3_jft": jft(6e-4, 14),  # in Table 6 alone: the rate is that of R152x2
    "r50_vit_b16_jft": vit_jft("b", 8e-4, 7),
    "r50_vit_b32_jft": vit_jft("b", 8e-4, 7),
    "r50_vit_l32_jft": vit_jft("l", 2e-4, 7),
    "r50_vit_l16_jft": vit_jft("l", 4e-4, 14),
    "vit_b16_in21k": in21k("b"),
    "vit_b32_in21k": in21k("b"),
    "vit_l16_in21k": in21k("l"),
    "vit_l32_in21k": in21k("l"),
    "vit_h14_in21k": in21k("h"),  # which Table 3 does not have
    "vit_b16_imagenet": imagenet("b"),
    "vit_b32_imagenet": imagenet("b"),
    "vit_l16_imagenet": imagenet("l"),
    "vit_l32_imagenet": imagenet("l"),
    # The settings in the names of vision_transformer's files of the best models (README.md).
    "vit_ti16_in21k_augreg": augreg("none", weight_decay=0.03),
    "vit_s32_in21k_augreg": augreg("none"),
    "vit_s16_in21k_augreg": augreg("light1", weight_decay=0.03),
    "vit_b32_in21k_augreg": augreg("light1"),
    "vit_b16_in21k_augreg": augreg("medium1"),
    "vit_l16_in21k_augreg": augreg("strong1"),
    "r_vit_ti16_in21k_augreg": augreg("none", weight_decay=0.03),
    "r26_vit_s32_in21k_augreg": augreg("light1"),
    "r50_vit_l32_in21k_augreg": augreg("medium1", regularization=0.1),
    "deit_ti16_imagenet": DEIT,
    "deit_s16_imagenet": DEIT,
    "deit_b16_imagenet": DEIT,
    "deit_ti16_distilled_imagenet": DEIT,
    "deit_s16_distilled_imagenet": DEIT,
    "deit_b16_distilled_imagenet": DEIT,
    "vit_b16_jft_masked": MASKED,
    "vit_s16_imagenet_90ep": BASELINE,
}


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_every_transformer_is_compiled() -> None:
    loaded = {path.stem: configs.load(TrainConfig, [path]) for path in FOLDER.glob("*.toml")}
    eager = {name for name, config in loaded.items() if not config.engine.compile}
    assert eager == {name for name, config in loaded.items() if config.model.kind == "resnet"}


def test_every_pretraining_config_has_its_row() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_pretraining_config_has_the_numbers_of_its_source(name: str) -> None:
    config = configs.load(TrainConfig, [FOLDER / f"{name}.toml"])
    assert {key: value_of(config, key) for key in RECIPES[name]} == RECIPES[name]
