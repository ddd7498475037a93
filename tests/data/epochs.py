"""Whole epochs of an index, compared, and the same index with its shards in a store."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from vitscale.data.cache import NodeCache
from vitscale.data.data_config import DataConfig
from vitscale.data.index import Index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Batch, Stream, batches
from vitscale.data.order import digest
from vitscale.data.sources import Source, make_mixture
from vitscale.data.transforms import AugmentConfig

CONFIG = DataConfig(index="index.json", lanes=4, window_chunks=2)


def epoch(index: Index, num_workers: int = 0, cache: NodeCache | None = None) -> list[Batch]:
    sources = (Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64)),)
    mixture = make_mixture(sources, CONFIG, seed=1, global_batch=8)
    stream = Stream(
        sources=sources,
        mixture=mixture,
        view_config=ViewConfig(AugmentConfig(), "simplejpeg", 16, 5),
        lanes=mixture.rank_lanes(0, 1),
        first_step=0,
        last_step=mixture.steps_per_epoch,
        cache=cache,
    )
    return list(batches(stream, num_workers))


def assert_same_epoch(remote: list[Batch], local: list[Batch]) -> None:
    assert len(remote) == len(local) == 12
    for ours, expected in zip(remote, local, strict=True):
        assert digest(ours.ids, 0) == digest(expected.ids, 0)
        assert torch.equal(ours.images, expected.images) and torch.equal(ours.labels, expected.labels)
        assert not ours.bad


def remote_index(local: Index, base: str) -> Index:
    shards = tuple(dataclasses.replace(shard, url=f"{base}/{Path(shard.url).name}") for shard in local.shards)
    return dataclasses.replace(local, shards=shards)
