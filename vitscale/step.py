"""One optimizer step of a rank, on its part of a global batch."""

import functools

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.data.loader import Batch
from vitscale.image_size import sides
from vitscale.job import Job
from vitscale.models.drop_path import draw_kept
from vitscale.objectives.objective import BatchKey
from vitscale.rng import derive_seed
from vitscale.start import Run


def train_step(run: Run, batch: Batch, step: int) -> Tensor:
    """One optimizer step on this rank's part of a global batch.

    Returns the mean loss of that part, fp32, on the device.
    """
    job, engine = run.job, run.engine
    config, plan, rank = job.config, job.plan, distributed.rank()
    total = torch.zeros((), device=distributed.device())
    micro_batches = zip(
        batch.images.split(plan.micro_batch), batch.labels.split(plan.micro_batch), strict=True
    )
    for micro_step, (images, labels) in enumerate(micro_batches):
        if config.model.dropout:
            torch.manual_seed(derive_seed(config.seed, "dropout", step, rank, micro_step))
        # Row 0's place in the global batch: with 512 images a rank in micro batches of 64, the
        # second micro batch of rank 1 starts at 512 + 64.
        key = BatchKey(config.seed, step, rank * plan.per_rank + micro_step * plan.micro_batch)
        forward = functools.partial(engine.forward, kept=kept_branches(job, key, images))
        with run.pace.forward():
            loss = run.objective.loss(forward, images, labels, key)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / plan.grad_accum_steps
    return total


def kept_branches(job: Job, key: BatchKey, images: Tensor) -> Tensor | None:
    """What model.drop_path leaves of the blocks' branches for a micro batch; None = all."""
    model = job.config.model
    if not model.drop_path:
        return None
    kept = draw_kept(model.drop_path, model.resolved_depth, count=len(images), **key._asdict())
    return kept.to(images.device, non_blocking=True)


def skipped_step(run: Run) -> Tensor:
    """As train_step, for a rank without a batch, while the others have one: all skip the step.

    They cannot be left alone in the collectives of a step that they have begun.
    """
    job, device = run.job, distributed.device()
    size, rows = sides(job.config.model.image_size), job.plan.micro_batch
    images = torch.zeros(rows, 3, *size, dtype=torch.uint8, device=device)
    labels = torch.full((rows, 1), -1, device=device)
    key = BatchKey(job.config.seed, 0, 0)
    # As in train_step: compiled blocks would be compiled again for a call without `kept`.
    forward = functools.partial(run.engine.forward, kept=kept_branches(job, key, images))
    for _ in range(job.plan.grad_accum_steps):
        # The objective's own loss: each parameter that it trains takes part in collectives.
        loss = run.objective.loss(forward, images, labels, key)
        run.engine.backward(loss * float("nan"))
        run.engine.step()
    return torch.full((), float("nan"))
