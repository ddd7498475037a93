"""Every option of training beside every other, against one plain PyTorch loop.

A grid in which each pair of values of two options occurs at least once, instead of all
combinations of them.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.plain import plain_losses
from multiprocess.test_figures import distances
from multiprocess.zygote import Zygote

OPTIONS: Mapping[str, Sequence[str]] = {
    "ranks": ("1", "2"),
    "engine.micro_batch": ("2", "4"),
    "engine.zero_stage": ("1", "2", "3"),
    "engine.activation_checkpointing": ("none", "selective", "full"),
    "engine.offload_optimizer": ("false", "true"),
    "optim.clip_norm": ("0", "0.05"),
    "optim.ema_decay": ("0", "0.9"),
    "optim.freeze": ("[]", '["blocks.0.*"]'),
    "optim.layer_decay": ("1", "0.7"),
    "augment.mixup": ("0", "0.8"),
    "augment.cutmix": ("0", "1"),
    "model.drop_path": ("0", "0.4"),
    "loss.label_smoothing": ("0", "0.1"),
    "loss.name": ("softmax", "sigmoid"),
    "schedule.decay": ("cosine", "wsd"),
}
Row = dict[str, str]
NUM_ALWAYS = 7


def covering(options: Mapping[str, Sequence[str]], seed: int = 0) -> list[Row]:
    """Rows with every pair of values of two options; each is the best of some random ones."""
    draws = random.Random(seed)
    pairs = {
        frozenset([(a, value), (b, other)])
        for a, b in itertools.combinations(options, 2)
        for value in options[a]
        for other in options[b]
    }
    rows: list[Row] = []
    while pairs:
        drawn = [{name: draws.choice(values) for name, values in options.items()} for _ in range(200)]
        rows.append(max(drawn, key=lambda row: len(pairs & pairs_of(row))))
        pairs -= pairs_of(rows[-1])
    return rows


def pairs_of(row: Row) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def overrides_of(row: Row) -> list[str]:
    overrides = [f"{name}={value}" for name, value in row.items() if name != "ranks"]
    cooldown = ["schedule.cooldown_steps=4"] if row["schedule.decay"] == "wsd" else []
    return [*overrides, *cooldown, "total_steps=10"]


@pytest.mark.parametrize("row", covering(OPTIONS), ids=lambda row: "-".join(row.values()))
def test_any_options_together_train_as_a_plain_loop_does(
    tmp_path: Path, index: Path, zygote: Zygote, row: Row, sweep: bool
) -> None:
    if not sweep and row not in covering(OPTIONS)[:NUM_ALWAYS]:
        pytest.skip(f"with --sweep: the first {NUM_ALWAYS} rows have 92% of the pairs")
    job = Job(tmp_path, index)
    overrides = overrides_of(row)
    ranks = int(row["ranks"])
    assert zygote.train(job, ranks, *overrides) == [0] * ranks, job.output()
    losses = job.column("train/loss")
    assert losses == pytest.approx(plain_losses(job.config, *overrides), abs=1e-6)
    assert len(set(losses)) == 10


@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_blocks_with_every_option_train_as_a_plain_loop_does_beside_their_figures(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int
) -> None:
    row = {name: values[-1] for name, values in OPTIONS.items()} | {"engine.zero_stage": str(stage)}
    overrides = overrides_of(row)
    job = Job(tmp_path, index)
    compiled = ("engine.compile=true", "log.figures_every_steps=5")
    assert zygote.train(job, 2, *overrides, *compiled) == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(plain_losses(job.config, *overrides), abs=1e-5)
    assert list(distances(job)) == [5, 10]
