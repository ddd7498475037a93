"""How a model is fine-tuned on a task as published: settings, sizes and schedules."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vitscale.config import to_dict
from vitscale.finetune.model import tuned_model
from vitscale.models import ModelConfig
from vitscale.vtab.tasks import Task


class Setting(NamedTuple):
    """One of the choices of a sweep."""

    lr: float
    steps: int

    def __str__(self) -> str:
        return f"lr{self.lr:g}-steps{self.steps}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to fine-tune by SGD with momentum 0.9, without weight decay.

    settings: one is taken as it is; of several, the dev images choose.
    decay: of the learning rate (vitscale.optim.schedule). dropout: of models that have it.
    augments: whether images are cropped and flipped as by BiT (augmentation).
    """

    image_size: int
    batch: int
    settings: tuple[Setting, ...]
    decay: str
    clip_norm: float
    dropout: float
    augments: bool


# Tasks whose labels do not survive a crop or a flip (BiT, arXiv 1912.11370, appendix F).
NO_CROP = frozenset({"clevr_count", "clevr_distance", "dmlab", "dsprites_location", "kitti_distance"})
NO_FLIP = frozenset({"dsprites_location", "dsprites_orientation", "smallnorb_azimuth"})
BIT_CROP = (384 / 448) ** 2  # the share of an image of 448 px that a crop of 384 px has (section 3.3)

PROTOCOLS: Mapping[str, Protocol] = {
    # ViT (arXiv 2010.11929, appendix B.1.1 and D): one setting for all tasks, at 384 px, and
    # BiT's crops and flips. The dropout of the paper's fine-tunings is in the README.md of
    # vision_transformer alone. The papers name no warmup.
    "paper": Protocol(
        image_size=384,
        batch=512,
        settings=(Setting(0.01, 2500),),
        decay="cosine",
        clip_norm=1.0,
        dropout=0.1,
        augments=True,
    ),
    # VTAB's lightweight sweep (arXiv 1910.04867): a tenth at 30, 60 and 90% of the steps.
    "light": Protocol(
        image_size=224,
        batch=512,
        settings=tuple(Setting(lr, steps) for lr in (0.1, 0.01) for steps in (2500, 10_000)),
        decay="step",
        clip_norm=0.0,
        dropout=0.0,
        augments=False,
    ),
}


def augmentation(task: str) -> dict[str, Any]:
    """The [augment] section of a task: BiT's random crop and flip, where its labels allow them.

    Deviation: BiT resizes an image before it crops it; here the crop is resized.
    """
    if task in NO_CROP:
        crop: dict[str, Any] = {"crop": "resize"}
    else:
        crop = {"crop": "proportional", "crop_area": [BIT_CROP, BIT_CROP]}
    return {**crop, "flip": task not in NO_FLIP}


def finetuning_config(
    protocol: Protocol,
    setting: Setting,
    task: Task,
    *,
    checkpoint: str,
    model: ModelConfig,
    index: str,
    run_dir: str,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """The config of one run, as nested plain values.

    model: of the checkpoint. Its head is replaced by one linear layer of zeros; its dropout
    becomes the protocol's, and its drop_path 0.
    """
    changes = {
        "image_size": protocol.image_size,
        "num_classes": task.num_classes,
        "dropout": protocol.dropout,
    }
    return {
        "run_dir": run_dir,
        "seed": seed,
        "global_batch": protocol.batch,
        "total_steps": setting.steps,
        "precision": precision,
        "init": {"checkpoint": checkpoint},
        "model": to_dict(tuned_model(model, changes)),
        "data": {"index": index},
        "augment": augmentation(task.name) if protocol.augments else {"crop": "resize", "flip": False},
        "optim": {"name": "sgd", "lr": setting.lr, "momentum": 0.9, "clip_norm": protocol.clip_norm},
        "schedule": {"decay": protocol.decay},
        "checkpoint": {"every_steps": 500, "keep_last": 1},
        "log": {"tensorboard": False},
    }
