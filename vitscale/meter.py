"""The numbers of a logged row: what all ranks did since the last one."""

import logging
import socket
import time

import numpy as np
import torch
from torch import Tensor

from vitscale import distributed
from vitscale.data.loader import Batch
from vitscale.data.order import DIGEST_MASK, digest
from vitscale.data.stages import Stages, advice
from vitscale.engine.engine import Engine
from vitscale.engine.norms import StepNorms
from vitscale.job import Job
from vitscale.metrics.pace import Pace, SlowRank, slowest
from vitscale.models.flops import train_flops
from vitscale.progress import Progress
from vitscale.system.hardware import peak_flops

logger = logging.getLogger(__name__)
ROWS_BEFORE_ADVICE = 3


class Meter:
    """Turns what happened since the last logged step into the numbers of one row.

    It listens to the phases of the loop: an evaluation or a save restarts the measurement, so
    that neither counts as training.
    """

    def __init__(self, job: Job, pace: Pace) -> None:
        self._job, self._pace = job, pace
        self._slow = SlowRank(distributed.gather_json(socket.gethostname()))
        self._flops = train_flops(job.config.model)
        self._peak = peak_flops()
        self._digest, self._rows, self._advised = 0, 0, False
        self._norms: StepNorms | None = None
        self._restart()
        self._forget_losses()

    def started(self, phase: str) -> None:
        """Phases are counted when they end."""

    def ended(self, phase: str, seconds: float) -> None:
        if phase == "data":
            self._waited += seconds
        if phase in ("evaluate", "save"):
            self._restart()

    def before_step(self, engine: Engine, *, logged: bool) -> None:
        """Note what log.norms compares with; every rank calls it.

        logged: whether a row will follow.
        """
        config = self._job.config
        self._norms = StepNorms(engine, config.optim) if config.log.norms and logged else None

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Count a step and its loss, and compute this rank's share of its digest."""
        self._steps += 1
        self._losses += loss  # on the device: nothing waits for it
        self._num_losses += 1
        self._stages = Stages.total([self._stages, batch.stages])
        self._digest = digest(batch.ids, distributed.rank() * self._job.plan.per_rank)

    def read(self, engine: Engine, loss: Tensor, lr: float, progress: Progress) -> dict[str, float]:
        """The numbers of this step; every rank calls it at the same steps."""
        config, world = self._job.config, distributed.world_size()
        mean = float(self._losses) / self._num_losses
        loss_sum, mean_sum, waited = distributed.all_reduce_sum([float(loss), mean, self._waited])
        rank, ratio = slowest(distributed.gather_floats(self._pace.read()))
        self._slow.add(rank, ratio)
        elapsed = time.perf_counter() - self._began
        stages = Stages(*distributed.all_reduce_sum(list(self._stages)))
        (total_digest,) = distributed.all_reduce_sum_int([self._digest])
        speed = self._steps * config.global_batch / elapsed
        numbers = {
            "samples_seen": progress.samples_seen,
            **self._epochs(progress.data_step),
            "train/loss": float(np.float32(loss_sum / world)),
            "train/loss_mean": mean_sum / world,
            "train/lr": lr,
            "train/grad_norm": float(engine.grad_norm()),
            "train/skipped_steps": engine.counters.skipped_steps,
            "perf/images_per_second": speed,
            "time/data_wait_fraction": waited / world / elapsed,
            "data/bad_samples": progress.bad_samples,
            "data/digest": total_digest & DIGEST_MASK,
            "perf/memory_gib": distributed.peak_bytes() / 2**30,
            "run/world_size": world,
        }
        if config.engine.num_workers:
            numbers |= {f"loader/{name}_fraction": part for name, part in stages.fractions().items()}
        if self._norms:
            numbers |= self._norms.read()
        self._advise(stages, waited / world / elapsed, elapsed)
        if world > 1:
            numbers |= {"perf/slowest_rank": rank, "perf/slowest_ratio": ratio}
        if self._peak:
            numbers["perf/mfu"] = speed / world * self._flops / self._peak
        self._restart()
        self._forget_losses()
        return numbers

    def _advise(self, stages: Stages, wait_fraction: float, elapsed: float) -> None:
        """Say once why training waits for data, but not of the first rows: workers start."""
        self._rows += 1
        num_workers = self._job.config.engine.num_workers
        text = advice(stages, wait_fraction=wait_fraction, elapsed=elapsed, num_workers=num_workers)
        if text and self._rows > ROWS_BEFORE_ADVICE and not self._advised:
            self._advised = True
            logger.info("%s", text)

    def _restart(self) -> None:
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()
        self._stages = Stages()

    def _forget_losses(self) -> None:
        self._losses = torch.zeros((), dtype=torch.float64, device=distributed.device())
        self._num_losses = 0

    def _epochs(self, data_step: int) -> dict[str, float]:
        """How many times the data were passed through; in a mixture, each source."""
        job = self._job
        epochs = job.mixture.epochs(data_step)
        if len(epochs) == 1:
            return {"epoch": epochs[0]}
        return {f"data/epoch/{s.name}": e for s, e in zip(job.sources, epochs, strict=True)}
