"""Room in /dev/shm for what data workers hold ready."""

from pathlib import Path

import pytest
import torch
from make import write_shards

from vitscale import config as configs
from vitscale.data.loader import PREFETCHED_STEPS
from vitscale.evals import open_task
from vitscale.shared_memory import needed
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
        (["engine.num_workers=3", "evals.a.test=a.tar"], TRAINING + (2 * 3 + IN_USE) * 256 * IMAGE),
        (["engine.num_workers=3", "evals.a={test='a.tar', num_workers=0}"], TRAINING),
        (["engine.num_workers=0", "evals.a={test='a.tar', num_workers=1}"], (2 + IN_USE) * 256 * IMAGE),
        # One evaluation at a time.
        (
            [
                "evals.a={test='a.tar', num_workers=4, batch_size=100}",
                "evals.b={test='b.tar', num_workers=1, batch_size=500}",
            ],
            TRAINING + max(800 + 100 * IN_USE, 1000 + 500 * IN_USE) * IMAGE,
        ),
    ],
)
def test_shared_memory_is_that_of_training_and_of_an_evaluation(overrides: list[str], expected: int) -> None:
    config = configs.load(TrainConfig, [PRETRAIN], ["global_batch=4096", *overrides])
    assert needed(config, 8) == expected


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
    tasks = {"a": open_task("a", config.evals["a"], config.model.image_size)}
    assert needed(config, 2, tasks) == images * IMAGE
