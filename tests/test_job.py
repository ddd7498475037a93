"""What follows from a config and its data before anything starts."""

from pathlib import Path

import pytest
from make import write_index

from vitscale import config as configs
from vitscale.data.sources import open_sources
from vitscale.job import worlds
from vitscale.train_config import TrainConfig


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [1, 2, 3, 4, 6, 8, 12, 24]),
        (["engine.micro_batch=4"], [1, 2, 3, 6]),
        (["augment.mixup=0.2"], [1, 2, 3, 4, 6, 12]),
        (["augment.repeats=3", "engine.micro_batch=6"], [1, 2, 4]),
    ],
)
def test_the_numbers_of_processes_that_can_share_a_run(
    tmp_path: Path, overrides: list[str], expected: list[int]
) -> None:
    index = write_index(tmp_path / "shards", [40])
    given = [f"run_dir={tmp_path / 'run'}", f"data.index={index}", "global_batch=24", "total_steps=1"]
    config = configs.load(TrainConfig, [], [*given, "model.variant=Ti/16", "model.num_classes=5", *overrides])
    assert worlds(config, open_sources(config.data)) == expected
