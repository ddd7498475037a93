"""launch/quickstart.sh: how many processes it starts, and on which devices."""

import re
import subprocess
from pathlib import Path

import pytest

from vitscale import config as configs
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "quickstart.sh"


def chosen(gpus: int, visible: str = "") -> tuple[int, int, str]:
    """The numbers of processes before and after the kill, and the option for the first."""
    lines = SCRIPT.read_text()
    parts = re.findall(r"^(?:sharing|devices)\(\) \{$.*?^\}$|^(?:processes|others)=.*?$", lines, re.M | re.S)
    assert len(parts) == 4
    program = "\n".join(["set -euo pipefail", f"gpus={gpus}", *parts])
    ended = subprocess.run(
        ["bash", "-c", f'{program}\necho "$processes $others $(devices "$processes")"'],
        env={"PATH": "/usr/bin:/bin", **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})},
        capture_output=True,
        text=True,
        check=True,
    )
    processes, others, option = ended.stdout.split()
    return int(processes), int(others), option


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        (0, "", (2, 1, "--num_accelerators=2")),
        (1, "", (1, 1, "--include=localhost:0")),
        (2, "5,3", (2, 1, "--include=localhost:5,3")),
        (4, "", (4, 2, "--include=localhost:0,1,2,3")),
        (7, "", (6, 3, "--include=localhost:0,1,2,3,4,5")),
        (8, "7,6,5,4,3,2,1,0", (6, 3, "--include=localhost:7,6,5,4,3,2")),
        (16, "", (15, 6, "--include=localhost:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14")),
    ],
)
def test_the_visible_gpus_are_used_as_far_as_they_can_share_the_lanes(
    gpus: int, visible: str, expected: tuple[int, int, str]
) -> None:
    assert chosen(gpus, visible) == expected


@pytest.mark.parametrize("name", ["demo/shapes.toml", "finetune/digits.toml"])
def test_numbers_of_processes_that_divide_60_divide_the_lanes_of_both_configs(name: str) -> None:
    config = configs.load(TrainConfig, [ROOT / "configs" / name])
    assert config.data.lanes == 0 and config.global_batch % 60 == 0  # lanes: the largest divisor up to 1,024
