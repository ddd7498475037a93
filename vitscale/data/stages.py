"""What data workers spend their time on, and what would make them keep up."""

import math
from collections.abc import Iterable
from typing import NamedTuple

LONG_WAIT = 0.1  # of the time, above which the trainer is said to wait for data


class Stages(NamedTuple):
    """Seconds of data workers, added up.

    read: waiting for chunks of shards, which threads read ahead.
    decode: taking samples apart, decoding, cropping, resizing.
    finish: flips, colours, erasing, and making a batch of them.
    idle: a batch is ready, and not yet asked for; or it is being sent.
    """

    read: float = 0.0
    decode: float = 0.0
    finish: float = 0.0
    idle: float = 0.0

    @classmethod
    def total(cls, stages: Iterable["Stages"]) -> "Stages":
        return cls(*map(sum, zip(*stages, strict=True)))

    def fractions(self) -> dict[str, float]:
        """The part of each stage; all 0 if nothing was spent."""
        whole = sum(self)
        return {name: seconds / whole if whole else 0.0 for name, seconds in self._asdict().items()}


def advice(stages: Stages, *, wait_fraction: float, elapsed: float, num_workers: int) -> str:
    """Why the trainer waits for data, and what would help; "" if it does not wait for long.

    stages: of all workers of all ranks within `elapsed` seconds, of which a rank waited for
        wait_fraction.
    num_workers: of each rank; 0 = the trainer reads by itself.

    For example, 8 workers that decode all of the time while the trainer waits for half of it
    would have to be 16.
    """
    if wait_fraction <= LONG_WAIT:
        return ""
    waits = f"training waits for data {wait_fraction:.0%} of the time"
    if num_workers == 0:
        return f"{waits}, since it reads and decodes by itself: set engine.num_workers to 1 or more"
    if stages.read > stages.decode + stages.finish:
        return (
            f"{waits}; storage-bound: data workers wait for shards {stages.fractions()['read']:.0%} of "
            "theirs; more engine.num_workers read more at once, and engine.cache_dir keeps chunks on the node"
        )
    busy = (stages.decode + stages.finish) / elapsed
    more = math.ceil(busy / (1 - wait_fraction) - busy)
    cores = "core" if more == 1 else "cores"
    return (
        f"{waits}; CPU-bound: {more:,} more {cores} would keep up, with engine.num_workers raised from "
        f"{num_workers}; or store smaller images: tools/data.py pack --short-side"
    )
