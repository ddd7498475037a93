"""`tools/bench.py sorted`: what shards that are sorted by class do to batches, by order.

A simulation with the real order, of classes of equal size, without images. It needs no file.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from vitscale import rng
from vitscale.data.data_config import DataConfig
from vitscale.data.index import CHUNK_SAMPLES
from vitscale.data.mixture import Mixture, default_lanes
from vitscale.data.order import ShardLayout
from vitscale.errors import ConfigError

SHARD_SAMPLES = 1000
STEPS, BLOCKS = 64, 16  # figures are means over blocks of consecutive steps
Label = Callable[[Int64[np.ndarray, "..."]], Int64[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SortedBench:
    """The data set that is simulated. samples and classes: their numbers."""

    samples: int = 1_281_167
    classes: int = 1000
    global_batch: int = 1024

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= self.samples:
            raise ConfigError(f"--classes {self.classes} must be from 2 to the number of samples")
        if not 2 <= self.global_batch <= self.samples // 4:
            raise ConfigError(
                f"--global-batch {self.global_batch} must be from 2 to a quarter of --samples {self.samples}"
            )


class Setting(NamedTuple):
    """How batches are drawn. lanes: 0 = the default."""

    lanes: int = 0
    chunk_samples: int = CHUNK_SAMPLES
    window_chunks: int = DataConfig.window_chunks
    stratified: bool = False


def run(config: SortedBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Each setting's figures beside what uniform draws would give."""
    size, classes = config.global_batch, config.classes
    # A random number for each sample takes the place of its position in the shards.
    places = rng.permutation(config.samples, 0, "demo", 94)
    shuffled = functools.partial(_label, config, places)
    in_order = functools.partial(_label, config, None)
    results: dict[str, Any] = {
        "uniform draws": {
            "classes_in_a_batch": classes * (1 - (1 - 1 / classes) ** size),
            "pairs_of_one_class": 1 / classes,
        }
    }
    for name, setting in {"defaults": Setting(), "stratified": Setting(stratified=True)}.items():
        progress(f"shuffled shards, {name}")
        results[f"shuffled shards, {name}"] = measure(config, setting, shuffled)
    for name, setting in settings(size).items():
        progress(f"sorted shards, {name}")
        results[f"sorted shards, {name}"] = measure(config, setting, in_order)
    return results


def settings(global_batch: int) -> dict[str, Setting]:
    """The defaults, and what could be done instead."""
    lanes = default_lanes(global_batch)
    chosen = {
        "defaults": Setting(),
        "window_chunks = 4": Setting(window_chunks=4),
        "window_chunks = 8": Setting(window_chunks=8),
        f"lanes = {lanes // 2}, window_chunks = 4": Setting(lanes=lanes // 2, window_chunks=4),
        f"lanes = {global_batch}": Setting(lanes=global_batch),
        "chunks of 8, window_chunks = 8": Setting(chunk_samples=8, window_chunks=8),
        "stratified": Setting(stratified=True),
        "stratified, chunks of 8, window_chunks = 8": Setting(0, 8, 8, stratified=True),
    }
    return {name: setting for name, setting in chosen.items() if setting.lanes != lanes}


def measure(config: SortedBench, setting: Setting, label: Label) -> dict[str, float]:
    """Figures of the batches that a setting draws.

    spread: the deviation of a class's count in a batch; spread_of_64_steps: of its count in so
    many. Both are relative to those of uniform draws without replacement. pairs_of_one_class:
    the share of the pairs of neighbours, which mixup and cutmix mix, that have one class.
    """
    mixture = _mixture(config, setting)
    size, share = config.global_batch, 1 / config.classes
    steps = min(STEPS, mixture.steps_per_epoch // 2)
    batch, lagged, block, distinct, pairs = [], [], [], [], []
    for first in _block_starts(mixture.steps_per_epoch, steps):
        labels = label(_batches(mixture, first, steps))  # [steps, B]
        counts = np.stack([np.bincount(row, minlength=config.classes) for row in labels])
        excess = counts - size * share  # [steps, C]
        batch.append(np.square(excess).mean())
        lagged.append((excess[1:] * excess[:-1]).mean())
        block.append(np.square(excess.sum(axis=0)).mean())
        distinct.append((counts > 0).sum(axis=1).mean())
        even = labels[:, : size // 2 * 2]
        pairs.append((even[:, ::2] == even[:, 1::2]).mean())
    uniform = size * share * (1 - share)  # the variance, but for the samples that are taken
    left = [(config.samples - taken) / (config.samples - 1) for taken in (size, steps * size)]
    return {
        "samples_in_memory": float(mixture.lanes * mixture.orders[0].window_samples),
        "classes_in_a_batch": fmean(distinct),
        "correlation_with_the_next_batch": fmean(lagged) / fmean(batch),
        "spread_of_a_batch": math.sqrt(fmean(batch) / (uniform * left[0])),
        f"spread_of_{steps}_steps": math.sqrt(fmean(block) / (steps * uniform * left[1])),
        "pairs_of_one_class": fmean(pairs),
    }


def _label(
    config: SortedBench, places: Int64[np.ndarray, " n"] | None, ids: Int64[np.ndarray, "..."]
) -> Int64[np.ndarray, "..."]:
    """The classes of samples, in the order of the shards unless they have other places."""
    return (ids if places is None else places[ids]) * config.classes // config.samples


def _mixture(config: SortedBench, setting: Setting) -> Mixture:
    shards = np.full(-(-config.samples // SHARD_SAMPLES), SHARD_SAMPLES, dtype=np.int64)
    shards[-1] -= shards.sum() - config.samples
    return Mixture.make(
        [ShardLayout(shards, setting.chunk_samples)],
        [1.0],
        seed=0,
        global_batch=config.global_batch,
        lanes=setting.lanes,
        window_samples=[setting.window_chunks * setting.chunk_samples],
        stratified=setting.stratified,
    )


def _block_starts(steps_per_epoch: int, steps: int) -> Iterator[int]:
    """The first steps of BLOCKS blocks, none of which is in two epochs."""
    per_epoch = steps_per_epoch // steps
    for epoch in range(-(-BLOCKS // per_epoch)):
        stride = max(1, per_epoch // BLOCKS)
        for block in itertools.islice(range(0, per_epoch, stride), BLOCKS):
            yield epoch * steps_per_epoch + block * steps


def _batches(mixture: Mixture, first: int, steps: int) -> Int64[np.ndarray, "steps B"]:
    """The samples of consecutive steps, in batch order."""
    per_lane, order = mixture.per_lane, mixture.orders[0]
    lanes = [order.lane_ids(lane, first * per_lane, steps * per_lane) for lane in range(mixture.lanes)]
    return np.stack(lanes).reshape(mixture.lanes, steps, per_lane).swapaxes(0, 1).reshape(steps, -1)
