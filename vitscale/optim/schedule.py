"""The learning rate as a pure function of the step."""

import dataclasses
import math
from typing import Literal

from vitscale.config import check_choices
from vitscale.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time ([schedule]): a decay curve, times a linear warmup.

    decay:            "linear", "cosine", "rsqrt", "constant", "step": a tenth after each of
                      `drops`, or "wsd" (warmup, stable, decay): constant up to the cooldown
    warmup_steps, warmup_fraction:
                      steps over which the factor of the warmup rises from 0 to 1, or what share
                      of the run's steps these are, in [0, 1), so that a longer total has more
    end_lr:           where "linear" ends
    timescale_steps:  steps after which "rsqrt" has fallen to 1 / sqrt(2)
    drops:            where "step" falls, as shares of the run's steps
    cooldown_steps:   of "wsd" and "rsqrt": the last steps, over which the factor of the
                      cooldown falls from 1 to 0
    """

    ALTERNATIVES = ("warmup_steps", "warmup_fraction")

    decay: Literal["linear", "cosine", "rsqrt", "constant", "step", "wsd"] = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    end_lr: float = 0.0
    timescale_steps: int = 10_000
    drops: tuple[float, ...] = (0.3, 0.6, 0.9)
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.warmup_steps < 0 or self.end_lr < 0:
            raise ConfigError(
                f"schedule.warmup_steps {self.warmup_steps} and schedule.end_lr {self.end_lr} "
                "must not be negative"
            )
        if not 0 <= self.warmup_fraction < 1 or (self.warmup_fraction and self.warmup_steps):
            raise ConfigError(
                f"schedule.warmup_fraction {self.warmup_fraction} must lie in [0, 1), like 0.1, and be 0 "
                "where schedule.warmup_steps is set"
            )
        if self.timescale_steps < 1:
            raise ConfigError(f"schedule.timescale_steps {self.timescale_steps} must be above 0")
        if not all(0 < drop < 1 for drop in self.drops) or sorted(set(self.drops)) != list(self.drops):
            raise ConfigError(
                f"schedule.drops {list(self.drops)} must rise within (0, 1), like [0.3, 0.6, 0.9]"
            )
        if self.end_lr and self.decay != "linear":
            raise ConfigError(
                f'schedule.end_lr is read by decay = "linear" only, not by "{self.decay}"; remove it'
            )
        if self.cooldown_steps < 0 or (self.decay == "wsd" and not self.cooldown_steps):
            raise ConfigError(
                f"schedule.cooldown_steps {self.cooldown_steps} must not be negative, and with decay = "
                '"wsd" it must be above 0: a tenth to a fifth of the steps is usual'
            )
        if self.cooldown_steps and self.decay not in ("wsd", "rsqrt"):
            raise ConfigError(
                'schedule.cooldown_steps is read by decay = "wsd" and "rsqrt" only, not by '
                f'"{self.decay}"; remove it'
            )

    def warmup(self, total_steps: int) -> int:
        """The steps of the warmup in a run of so many: fewer than it has."""
        return self.warmup_steps or int(self.warmup_fraction * total_steps)


def learning_rate(step: int, total_steps: int, peak_lr: float, config: ScheduleConfig) -> float:
    """The rate of update `step`, from 1 to total_steps (paper, Table 3; big_vision utils.py).

    w = warmup(total_steps), t = timescale_steps, p = (step - w) / (total_steps - w), in [0, 1],
    c = cooldown_steps:

        linear      min(1, step / w) * (end_lr + (peak_lr - end_lr) * (1 - p))
        cosine      min(1, step / w) * peak_lr * (1 + cos(pi * p)) / 2
        rsqrt       min(1, step / w, (total_steps - step) / c) * peak_lr
                        * sqrt(t / (t + max(0, step - w)))
        constant    min(1, step / w) * peak_lr
        step        min(1, step / w) * peak_lr * 0.1 ** (drops below step / total_steps)
        wsd         min(1, step / w, (total_steps - step) / c) * peak_lr

    Warmup and cooldown fit into the run (TrainConfig.num_steps).
    """
    warmup = config.warmup(total_steps)
    factor = min(1.0, step / warmup) if warmup else 1.0
    if config.cooldown_steps:
        factor = min(factor, (total_steps - step) / config.cooldown_steps)
    progress = min(max((step - warmup) / (total_steps - warmup), 0.0), 1.0)
    if config.decay == "linear":
        return factor * (config.end_lr + (peak_lr - config.end_lr) * (1.0 - progress))
    if config.decay == "cosine":
        return factor * peak_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.decay == "rsqrt":
        shift = config.timescale_steps - warmup
        return (
            factor * peak_lr * math.sqrt(config.timescale_steps / max(step + shift, config.timescale_steps))
        )
    if config.decay == "step":
        return factor * peak_lr * 0.1 ** sum(step > drop * total_steps for drop in config.drops)
    return factor * peak_lr
