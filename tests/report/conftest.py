"""A run directory with checkpoints, for every test of reports."""

from pathlib import Path

import pytest
from make import state_of, write_step

METRICS = """{"step": 10, "train/loss": 2.5}
{"step": 10, "eval/cifar10/top1": 0.25}
{"step": 18, "train/loss": 1.75}
{"step": 20, "eval/cifar10/top1": 0.5, "eval/cifar10/10shot": 0.4375, "eval/cifar10/num_samples": 900}
{"step": 20, "eval/cifar10/10shot_std": 0.03125, "eval/probe/c": 10.0, "eval/probe/learning_rate": 0.3}
{"step": 25, "train/loss": "nan"}
{"step": 31, "train/loss": 9.0}
{"step": 30, "train/lo"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30 in a run directory with metrics."""
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        write_step(folder, step, state_of(step))
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "checkpoints" / "latest").write_text("step-000000030\n")
    return folder
