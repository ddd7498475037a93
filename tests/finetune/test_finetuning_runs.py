"""The folder and the device of a fine-tuning: what may change, and where it runs."""

import sys
import tomllib
from pathlib import Path

import pytest

from vitscale import config as configs
from vitscale.errors import ConfigError, UserError
from vitscale.finetune.runs import Slots, keep_config
from vitscale.finetune.vtab import VtabConfig, score
from vitscale.models.vit_config import ViTConfig
from vitscale.train_config import TrainConfig
from vitscale.vtab.tasks import TASKS

EVALS = {"a": {"kind": "classify", "test": "x"}}
BASE = {"run_dir": "run", "total_steps": 4, "data": {"index": "x"}, "evals": EVALS}


def config(*overrides: str) -> TrainConfig:
    return configs.resolve(TrainConfig, [BASE], overrides)


def test_a_repeated_command_may_change_what_leaves_results_as_they_are(tmp_path: Path) -> None:
    keep_config(tmp_path, config())
    changed = config("engine.micro_batch=8", "log.every_steps=1", "checkpoint.keep_last=1")
    keep_config(tmp_path, changed)
    assert configs.load(TrainConfig, [tmp_path / "config.toml"]) == changed


@pytest.mark.parametrize("override", ["optim.lr=0.5", "checkpoint.keep_best=eval/a/top1", "total_steps=5"])
def test_a_folder_with_another_run_is_left_as_it_is(tmp_path: Path, override: str) -> None:
    keep_config(tmp_path, config())
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"holds a run with other settings \({key}\); name another --out"):
        keep_config(tmp_path, config(override, "engine.micro_batch=8"))
    assert configs.load(TrainConfig, [tmp_path / "config.toml"]) == config()


@pytest.mark.parametrize(
    ("visible", "num_gpus", "used"),
    [
        (None, 2, ["0", "1", "0"]),
        ("4,5", 2, ["4", "5", "4"]),
        ("GPU-5a,GPU-6b,GPU-7c", 3, ["GPU-5a", "GPU-6b", "GPU-7c"]),
        ("4,-1,5", 1, ["4", "4", "4"]),
        ("", 0, ["", "", ""]),
    ],
)
def test_each_process_has_one_of_the_gpus_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, num_gpus: int, used: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    with Slots(3, num_gpus) as slots:
        for _ in used:
            assert slots.run(["-c", code], tmp_path / "log", [sys.executable, "-S"]) == 0
    assert (tmp_path / "log").read_text().splitlines() == used


@pytest.mark.parametrize("checkpoint", ["s3://bucket/run", "runs/vit"])
def test_a_vtab_run_starts_from_the_checkpoint_wherever_that_is(tmp_path: Path, checkpoint: str) -> None:
    vtab = VtabConfig(checkpoint=checkpoint, data=tmp_path / "data", out=tmp_path / "out")
    slots = Slots(1, 0)
    slots.stop()  # nothing is trained: the config is what counts
    with pytest.raises(UserError, match="ended early"):
        score(vtab, TASKS["svhn"], ViTConfig(variant="mu/16"), slots)
    values = tomllib.loads((tmp_path / "out/svhn/final-seed0/config.toml").read_text())
    expected = checkpoint if "://" in checkpoint else str(Path(checkpoint).absolute())
    assert values["init"]["checkpoint"] == expected
