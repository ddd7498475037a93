"""When a run that goes wrong is rolled back, watched or ended ([guard])."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vitscale import config as configs
from vitscale.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run that goes wrong is rolled back or ended ([guard]).

    skipped_steps:  so many steps in a row whose losses or gradients are not finite roll the run
                    back to its newest healthy checkpoint; the data since then are passed over
    rollbacks:      so often in all; the next time ends the run
    spike_deviations:
                    a loss so many deviations above those before it is written down with its
                    samples (RUN/spikes.jsonl); 0 = none is
    start_minutes, data_minutes, step_minutes, save_minutes, evaluate_minutes:
                    how long a rank may take to start, which includes its first step, to wait
                    for a batch, to train on it, to wait for a save, and to evaluate; after that
                    the job ends, and says which rank hangs where; 0 = any time
    """

    skipped_steps: int = 10
    rollbacks: int = 2
    spike_deviations: float = 10.0
    start_minutes: float = 30.0
    data_minutes: float = 10.0
    step_minutes: float = 5.0
    save_minutes: float = 60.0
    evaluate_minutes: float = 60.0

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        minutes = [key for key in values if key.endswith("_minutes")]
        return configs.infinite_as_zero(values, ["spike_deviations", *minutes])

    def limit_seconds(self) -> dict[str, float]:
        """How long each phase of training may take; inf = any time."""
        minutes = {
            "start": self.start_minutes,
            "data": self.data_minutes,
            "step": self.step_minutes,
            "log": self.step_minutes,
            "save": self.save_minutes,
            "evaluate": self.evaluate_minutes,
        }
        return {phase: 60 * limit if limit else math.inf for phase, limit in minutes.items()}

    def __post_init__(self) -> None:
        configs.positive("guard", skipped_steps=self.skipped_steps)
        if not self.spike_deviations >= 0:
            raise ConfigError(
                f"guard.spike_deviations {self.spike_deviations} must not be negative; 0 = none"
            )
        for name in ("start", "data", "step", "save", "evaluate"):
            minutes = getattr(self, f"{name}_minutes")
            if not minutes >= 0:
                raise ConfigError(f"guard.{name}_minutes {minutes} must not be negative; 0 = any time")
        if self.rollbacks < 0:
            raise ConfigError(f"guard.rollbacks {self.rollbacks} must not be negative; 0 = never roll back")
