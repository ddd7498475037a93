"""The loader for any training loop: this rank's part of every global batch of one index."""

import logging
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vitscale import distributed
from vitscale.config import positive
from vitscale.data.data_config import DataConfig
from vitscale.data.decode import resolve_decoder
from vitscale.data.index import check_shards
from vitscale.data.indexing import open_index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Batch, Stream, batches
from vitscale.data.sources import Source, make_mixture
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, sides

logger = logging.getLogger(__name__)
INCEPTION = AugmentConfig()  # Inception crop and flip


class DatasetState(TypedDict):
    """Where a dataset is. step: the global batches that it has delivered, on any world size."""

    step: int
    order: str


class BatchDataset(IterableDataset[Batch]):
    """This rank's part of every global batch, as an iterable dataset that can be resumed.

    Each pass over it yields the batches of one epoch, or what is left of one that was begun.
    The next pass is the next epoch, in another order. Over `world_size` ranks, the parts make
    up the same global batches at any world size, and `step` says how many were delivered.

    It starts its own `num_workers` processes: iterate over it directly, or through a DataLoader
    with batch_size=None and without workers. A sample that cannot be used is replaced by
    another one, and named in the batch's `bad` and in a warning.

    index: an index.json, or shards by glob, brace pattern or URL, which are indexed in memory.
    global_batch: images in a step on all ranks together. image_size: of the views, in
    pixels: a square's side, or (height, width).
    rank, world_size: None = as the process group or the launcher (torchrun, deepspeed, srun)
    says; without either, 0 and 1, which each of independent processes has to pass under srun.
    augment: its mixup and cutmix are the loop's to apply, so they must be 0 here. first_step:
    how many global batches to pass over. Raises ConfigError for numbers that do not fit, and
    DataError or StoreError for data that cannot be read.
    """

    def __init__(
        self,
        index: str | Path,
        *,
        global_batch: int,
        image_size: ImageSize,
        rank: int | None = None,
        world_size: int | None = None,
        augment: AugmentConfig = INCEPTION,
        seed: int = 0,
        first_step: int = 0,
        num_workers: int = 0,
    ) -> None:
        rank = distributed.launched_rank() if rank is None else rank
        world_size = distributed.launched_world_size() if world_size is None else world_size
        positive("", global_batch=global_batch, image_size=min(sides(image_size)), world_size=world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank {rank} must be from 0 to world_size - 1 = {world_size - 1}; pass both, or neither if "
                "a launcher sets RANK and WORLD_SIZE"
            )
        if min(seed, first_step, num_workers) < 0:
            raise ConfigError(
                f"seed {seed}, first_step {first_step} and num_workers {num_workers} must not be negative"
            )
        if augment.mixup or augment.cutmix:
            raise ConfigError(
                f"augment.mixup {augment.mixup} and augment.cutmix {augment.cutmix} mix whole batches, which "
                "the training loop does on the device; set them to 0 for the loader"
            )
        opened = open_index(str(index))
        if rank == 0:  # thousands of ranks would ask a shared store millions of times
            check_shards(opened)
        source = Source(name="0", index=opened, label_map={}, excluded=np.empty(0, dtype=np.int64))
        self._mixture = make_mixture(
            (source,), DataConfig(), seed=seed, global_batch=global_batch, repeats=augment.repeats
        )
        self._source, self._lanes = source, self._mixture.rank_lanes(rank, world_size)
        num_classes = opened.max_label + 1
        self._view_config = ViewConfig(augment, resolve_decoder("auto"), image_size, num_classes)
        self._num_workers = num_workers
        self.step = first_step

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch: the last incomplete one is left out."""
        return self._mixture.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of the current epoch."""
        return self.batches_until((self.step // self.steps_per_epoch + 1) * self.steps_per_epoch)

    def batches_until(self, last_step: int) -> Generator[Batch, None, None]:
        """The batches from `step` to `last_step`, which is excluded, through all epochs."""
        if get_worker_info():
            raise ConfigError(
                "a BatchDataset starts its own workers; pass num_workers to it, and 0 to the DataLoader"
            )
        stream = Stream(
            sources=(self._source,),
            mixture=self._mixture,
            view_config=self._view_config,
            lanes=self._lanes,
            first_step=self.step,
            last_step=last_step,
        )
        for batch in batches(stream, self._num_workers):
            for sentence in batch.bad:
                logger.warning("a sample was replaced: %s", sentence)
            self.step += 1
            yield batch

    def state_dict(self) -> DatasetState:
        """Where the dataset is, equal on all ranks."""
        return {"step": self.step, "order": self._order()}

    def load_state_dict(self, state: DatasetState) -> None:
        """Continue where a dataset was, on this or another number of ranks and workers.

        Raises ConfigError for the state of other shards or another order.
        """
        if state["order"] != self._order():
            raise ConfigError(
                "the state is of another data set or another order; use the same shards, seed, global_batch "
                "and augment.repeats, or start without it"
            )
        self.step = state["step"]

    def _order(self) -> str:
        return self._mixture.fingerprint([self._source.fingerprint()])


def load(
    index: str | Path,
    *,
    global_batch: int,
    image_size: ImageSize,
    rank: int | None = None,
    world_size: int | None = None,
    augment: AugmentConfig = INCEPTION,
    seed: int = 0,
    first_step: int = 0,
    num_workers: int = 0,
) -> Generator[Batch, None, None]:
    """This rank's part of every global batch from `first_step` on, through all epochs, no end.

    To resume, pass the number of steps that are done as `first_step`. Arguments and errors are
    those of BatchDataset, which yields the same batches an epoch at a time.
    """
    dataset = BatchDataset(
        index,
        global_batch=global_batch,
        image_size=image_size,
        rank=rank,
        world_size=world_size,
        augment=augment,
        seed=seed,
        first_step=first_step,
        num_workers=num_workers,
    )
    return dataset.batches_until(sys.maxsize)
