"""--dry-run shows what follows from a config and writes nothing; all of configs/ loads."""

from pathlib import Path

import pytest

from launch.train import main
from vitscale import config as configs
from vitscale.dry_run import describe
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def test_the_numbers_are_shown_and_the_run_directory_is_left_alone(tmp_path: Path, index, capsys) -> None:
    overrides = [
        f"data.index={tmp_path}/shards/index.json",
        f"run_dir={tmp_path}/run",
        "global_batch=16",
        "log.tensorboard=false",
    ]
    overrides += ["model.variant=B/16", "schedule.warmup_steps=1", "optim.weight_decay=0.03"]
    path = tmp_path / "c.toml"
    path.write_text("total_epochs = 3\n")
    assert main([str(path), *overrides, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "86,567,656",
        "6.907755",
        "3e-05 per step",
        '"train_batch_size": 16',
        "97 in 3 shards",
        "1 each epoch (different ones)",
    ):
        assert part in shown, shown
    assert not (tmp_path / "run").exists()
    assert main([str(path), *overrides, "--dry-run", "modle.variant=B/16"]) == 2
    assert "did you mean model?" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_says_what_to_expect(path: Path) -> None:
    config = configs.load(TrainConfig, [path])
    header = path.read_text().split("\n\n")[0].split("run_dir")[0]
    assert "Expected" in header and ("easured here" in header or "not run here" in header)
    assert configs.from_dict(TrainConfig, configs.to_dict(config)) == config


def test_a_config_can_be_written_and_read_back(tmp_path: Path) -> None:
    config = configs.load(
        TrainConfig, [ROOT / "configs/pretrain/vit_b16_in21k.toml"], ["engine.deepspeed_extra.a.b=1"]
    )
    (tmp_path / "c.toml").write_text(configs.to_toml(config))
    assert configs.load(TrainConfig, [tmp_path / "c.toml"]) == config


def test_a_missing_index_is_named_with_the_command_that_makes_it() -> None:
    config = configs.load(TrainConfig, [ROOT / "configs/pretrain/vit_b16_in21k.toml"])
    with pytest.raises(
        ValueError, match=r"index data/in21k/index.json is missing .*tools/data.py index SHARDS"
    ):
        describe(config, 8)
