"""A run as plain PyTorch: no DeepSpeed, no ranks, no accumulation, no recomputation."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from multiprocess.optimizers import plain_optimizer

from vitscale import config as configs
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream, batches
from vitscale.job import prepare
from vitscale.models import build_model
from vitscale.models.drop_path import draw_kept
from vitscale.objectives import build_objective
from vitscale.objectives.objective import BatchKey
from vitscale.optim.optimizers import freeze
from vitscale.optim.schedule import learning_rate
from vitscale.rng import derive_seed
from vitscale.start import open_teacher
from vitscale.train_config import TrainConfig


def plain_losses(
    path: Path, *overrides: str, look: Callable[[torch.nn.Module], object] = lambda model: None
) -> list[float]:
    """The loss of each step of the config's run.

    look: gets the model in every step, when it has the gradients of the old weights.
    """
    config = configs.load(TrainConfig, [path], overrides)
    job = prepare(config, world_size=1)
    model = build_model(config.model, derive_seed(config.seed, "init"))
    freeze(model, config.optim.freeze)
    optimizer = plain_optimizer(config.optim, model)
    objective = build_objective(
        config.objective,
        loss=config.loss,
        augment=config.augment,
        model=config.model,
        teacher=open_teacher(config),
    )
    stream = Stream(
        sources=job.sources,
        mixture=job.mixture,
        view_config=ViewConfig(
            config.augment, job.decoder, config.model.image_size, config.model.num_classes
        ),
        lanes=job.mixture.rank_lanes(0, 1),
        first_step=0,
        last_step=job.total_steps,
    )
    losses = []
    for step, batch in enumerate(batches(stream, 0), start=1):
        lr = learning_rate(step, job.total_steps, config.optim.lr, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        key = BatchKey(config.seed, step, first_position=0)
        rate, depth = config.model.drop_path, config.model.resolved_depth
        kept = draw_kept(rate, depth, count=len(batch.images), **key._asdict()) if rate else None
        loss = objective.loss(functools.partial(model, kept=kept), batch.images, batch.labels, key)
        optimizer.zero_grad()
        loss.backward()
        look(model)
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses
