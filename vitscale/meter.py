"""The numbers of a logged row: what the ranks have seen since the last one, added up."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale import distributed
from vitscale import engine as engines
from vitscale.data.loader import Batch
from vitscale.data.order import DIGEST_MASK, digest
from vitscale.job import Job
from vitscale.models.flops import train_flops

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
MIN_SAMPLES_FOR_BAD_FRACTION = 1000


@dataclasses.dataclass
class Progress:
    """Where the run is: `step` optimizer steps are done, `bad_samples` were replaced so far."""

    step: int = 0
    bad_samples: int = 0


class Meter:
    """Turns what happened since the last logged step into the numbers of one row."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._flops = train_flops(job.config.model)
        self._peak = engines.peak_flops()
        self._quarantine_file = Path(job.config.run_dir) / QUARANTINE_NAME
        self._bad: list[str] = []
        self._digest = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new window, so that saves and evaluations do not count as training time."""
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()

    def waiting_for_data(self) -> "Meter":
        return self

    def __enter__(self) -> None:
        self._wait_began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._wait_began

    def add(self, batch: Batch) -> None:
        """Count a step: this rank's digest of it, and the samples that were replaced."""
        self._steps += 1
        self._digest = digest(batch.ids, distributed.rank() * self._job.plan.per_rank)
        self._bad += batch.bad

    def read(self, engine: Any, loss: Tensor, lr: float, progress: Progress) -> dict[str, float]:
        """The numbers of this step; every rank calls it on the same steps."""
        config, world = self._job.config, distributed.world_size()
        loss_sum, waited = distributed.all_reduce_sum([float(loss), self._waited])
        elapsed = time.perf_counter() - self._began
        (total_digest,) = distributed.all_reduce_sum_int([self._digest])
        self.count_bad(progress)
        speed = self._steps * config.global_batch / elapsed
        numbers = {
            "samples_seen": progress.step * config.global_batch,
            **self._epochs(progress.step),
            "train/loss": float(np.float32(loss_sum / world)),
            "train/lr": lr,
            "train/grad_norm": float(np.float32(engines.grad_norm(engine))),
            "train/skipped_steps": int(engine.skipped_steps),
            "perf/images_per_second": speed,
            "time/data_wait_fraction": waited / world / elapsed,
            "data/bad_samples": progress.bad_samples,
            "data/digest": total_digest & DIGEST_MASK,
        }
        if self._peak:
            numbers["perf/mfu"] = speed / world * self._flops / self._peak
            numbers["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart()
        return numbers

    def _epochs(self, step: int) -> dict[str, float]:
        """How often the data were passed through; in a mixture, each source."""
        job = self._job
        epochs = job.mixture.epochs(step)
        if len(epochs) == 1:
            return {"epoch": epochs[0]}
        return {f"data/epoch/{s.name}": e for s, e in zip(job.sources, epochs, strict=True)}

    def count_bad(self, progress: Progress) -> None:
        """Add the samples replaced since the last call to `progress`, and quarantine them; every rank calls
        it.
        """
        (count,) = distributed.all_reduce_sum_int([len(self._bad)])
        if count:
            progress.bad_samples += count
            self._quarantine_bad(progress.step)

    def _quarantine_bad(self, step: int) -> None:
        sentences = [sentence for part in distributed.gather_json(self._bad) for sentence in part]
        self._bad = []
        if distributed.is_main():
            logger.warning(
                "%d samples could not be used and were replaced, the first: %s", len(sentences), sentences[0]
            )
            with open(self._quarantine_file, "a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"step": step, "sample": sentence}) + "\n" for sentence in sentences
                )


def too_many_bad(job: Job, progress: Progress) -> bool:
    """Whether more samples had to be replaced than data.max_bad_fraction allows, of those seen (counted as at
    least 1,000).
    """
    seen = max(progress.step * job.config.global_batch, MIN_SAMPLES_FOR_BAD_FRACTION)
    return progress.bad_samples > job.config.data.max_bad_fraction * seen


def bad_data_sentence(job: Job, progress: Progress) -> str:
    """What the user is told when the run ends for it."""
    seen = progress.step * job.config.global_batch
    return (
        f"{progress.bad_samples:,} of {seen:,} samples could not be used, more than data.max_bad_fraction "
        f"{job.config.data.max_bad_fraction} allows; {job.config.run_dir}/{QUARANTINE_NAME} lists them. A "
        f"checkpoint was saved at step {progress.step}: mend the shards and index them again, or raise the "
        "fraction"
    )
