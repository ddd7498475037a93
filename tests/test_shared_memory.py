"""Room in /dev/shm for what data workers hold ready."""

from pathlib import Path

import pytest

from vitscale import config as configs
from vitscale.data.loader import PREFETCHED_STEPS
from vitscale.shared_memory import needed
from vitscale.train_config import TrainConfig

PRETRAIN = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "vit_b16_in21k.toml"
IMAGE = 3 * 224 * 224
TRAINING = (PREFETCHED_STEPS + 1) * 512 * IMAGE


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TRAINING),
        (["engine.num_workers=0"], 0),
        # Two batches of each worker, which are as many as training has, or those that are said.
        (["engine.num_workers=3", "evals.a.test=a.tar"], TRAINING + 2 * 3 * 256 * IMAGE),
        (["engine.num_workers=3", "evals.a={test='a.tar', num_workers=0}"], TRAINING),
        (["engine.num_workers=0", "evals.a={test='a.tar', num_workers=1}"], 2 * 256 * IMAGE),
        # One evaluation at a time.
        (
            [
                "evals.a={test='a.tar', num_workers=4, batch_size=100}",
                "evals.b={test='b.tar', num_workers=1, batch_size=500}",
            ],
            TRAINING + 1000 * IMAGE,
        ),
    ],
)
def test_shared_memory_is_that_of_training_and_of_an_evaluation(overrides: list[str], expected: int) -> None:
    config = configs.load(TrainConfig, [PRETRAIN], ["global_batch=4096", *overrides])
    assert needed(config, 8) == expected
