"""Configs to plan, and their plans."""

from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale.models.flops import train_flops
from vitscale.plan.make import Cluster, Option, Plan, make_plan
from vitscale.plan.speed import Measured, Speed
from vitscale.system.hardware import GPUS
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
H14 = ROOT / "configs/pretrain/vit_h14_jft.toml"
B16 = ROOT / "configs/pretrain/vit_b16_in21k.toml"
VIT_22B = [
    "model.variant=G/14",
    "model.width=6144",
    "model.depth=48",
    "model.mlp_dim=24576",
    "model.num_heads=48",
]


def load(path: Path, *overrides: str) -> TrainConfig:
    return configs.load(TrainConfig, [path], overrides)


def plan(config: TrainConfig, gpus: int, *, speed: Speed | None = None, **cluster: Any) -> Plan:
    return make_plan(config, Cluster(gpus=gpus, **cluster), speed or Speed())


def at_half_the_peak(config: TrainConfig) -> Speed:
    """As the rows of test_formulas.py are reckoned."""
    seconds = train_flops(config.model) / (0.5 * GPUS["H100"].flops)
    row = Measured(
        model=config.model, compiled=True, checkpointing="none", seconds_per_image=seconds, gpu=GPUS["H100"]
    )
    return Speed(rows=(row,), device="NVIDIA H100")


def option_of(made: Plan, stage: int, policy: str = "none") -> Option:
    (option,) = [o for o in made.options if (o.zero_stage, o.checkpointing) == (stage, policy)]
    return option
