"""Room in /dev/shm for what data workers hold ready, and in TMPDIR for their sockets."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from make import write_index, write_shards

from vitscale import config as configs
from vitscale.data import load
from vitscale.data.evalset import EvaluationSet
from vitscale.data.loader import PREFETCHED_STEPS
from vitscale.errors import ConfigError
from vitscale.evals import open_task
from vitscale.evals.task import Task
from vitscale.shared_memory import check, needed
from vitscale.train_config import TrainConfig

PRETRAIN = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "vit_b16_in21k.toml"
IMAGE = 3 * 224 * 224
IN_USE = 0 if torch.cuda.is_available() else 1  # batches of an evaluation that are no copies on a GPU
TRAINING = (PREFETCHED_STEPS + 1) * 512 * IMAGE


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TRAINING),
        (["engine.num_workers=0"], 0),
        # Two batches of each worker, which are as many as training has, or those that are said.
        (
            ["engine.num_workers=3", "evals.a={test='TAR', batch_size=4}"],
            TRAINING + (2 * 3 + IN_USE) * 4 * IMAGE,
        ),
        (["engine.num_workers=3", "evals.a={test='TAR', num_workers=0}"], TRAINING),
        (
            ["engine.num_workers=0", "evals.a={test='TAR', num_workers=1, batch_size=4}"],
            (2 + IN_USE) * 4 * IMAGE,
        ),
        # One evaluation at a time.
        (
            [
                "evals.a={test='TAR', num_workers=4, batch_size=2}",
                "evals.b={test='TAR', num_workers=1, batch_size=10}",
            ],
            TRAINING + max(16 + 2 * IN_USE, 20 + 10 * IN_USE) * IMAGE,
        ),
    ],
)
def test_shared_memory_is_that_of_training_and_of_an_evaluation(
    tmp_path: Path, overrides: list[str], expected: int
) -> None:
    (test,) = write_shards(tmp_path, [8 * 30])  # 30 images for each rank
    overrides = [override.replace("TAR", test) for override in overrides]
    config = configs.load(TrainConfig, [PRETRAIN], ["global_batch=4096", *overrides])
    assert needed(config, 8, open_evaluations(config)) == expected


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ("num_workers=0, batch_size=256", 0),
        ("num_workers=8, batch_size=256", 5),  # of 10 images on 2 ranks
        ("num_workers=8, batch_size=1", 5),
        ("num_workers=1, batch_size=1", 2 + IN_USE),
        ("num_workers=2, batch_size=1", min(5, 4 + IN_USE)),
    ],
)
def test_an_evaluation_needs_no_more_than_its_own_images(tmp_path: Path, values: str, images: int) -> None:
    (test,) = write_shards(tmp_path, [10])
    overrides = ["engine.num_workers=0", f"evals.a={{test='{test}', {values}}}"]
    config = configs.load(TrainConfig, [PRETRAIN], ["global_batch=4096", *overrides])
    assert needed(config, 2, open_evaluations(config)) == images * IMAGE


def test_workers_start_only_where_the_paths_of_their_sockets_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_index(tmp_path, [8])
    images = EvaluationSet.open(str(index), image_size=8, num_workers=1)
    config = configs.load(TrainConfig, [PRETRAIN], ["engine.num_workers=1"])
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for length in (75, 76):
            long = Path(folder, "t" * (length - len(folder) - 1))
            long.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(long))
            for start in (
                lambda: next(iter(load(index, global_batch=8, image_size=8, num_workers=1))),
                lambda: next(images.batches(np.arange(8), 8)),
                lambda: check(config, {}),
            ):
                if length == 75:
                    start()
                    continue
                with pytest.raises(ConfigError, match=f"socket in {long} .*too long.*; set TMPDIR=/tmp, or"):
                    start()
        check(configs.load(TrainConfig, [PRETRAIN], ["engine.num_workers=0"]), {})


def open_evaluations(config: TrainConfig) -> dict[str, Task]:
    return {name: open_task(name, section, config.model.image_size) for name, section in config.evals.items()}
