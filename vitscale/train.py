"""Training: one straight loop. Fine-tuning is the same loop with an [init] section.

Start order: 1 resume this run from its newest good checkpoint; 2 go on from another run's full state ([init]
with full_state); 3 initialise weights from another checkpoint ([init], with a new head and resized position
embeddings); 4 from scratch.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import signal
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale import config as configs
from vitscale import distributed
from vitscale import engine as engines
from vitscale.checkpoint import load, state
from vitscale.checkpoint.ema import Ema
from vitscale.checkpoint.export import SavedModel, State, locate
from vitscale.checkpoint.saver import Saver
from vitscale.checkpoint.store import Home
from vitscale.data.cache import NodeCache
from vitscale.data.index import DataError
from vitscale.data.lane import Recipe
from vitscale.data.loader import Batch, Stream, batches, on_device
from vitscale.data.mixup import mix
from vitscale.data.transforms import normalize
from vitscale.evals.tasks import ClassifyTask, FewShotTask, open_task
from vitscale.job import (
    Job,
    TrainConfig,
    check_continuation,
    check_new_length,
    claim_run_dir,
    prepare,
    write_config,
)
from vitscale.losses import compute_loss, to_targets
from vitscale.meter import QUARANTINE_NAME, Meter, Progress, bad_data_sentence, too_many_bad
from vitscale.metrics import MetricsWriter, trim_metrics
from vitscale.models import build_model
from vitscale.models.transfer import transfer_state
from vitscale.models.vit import ViT
from vitscale.optim import build_optimizer, freeze
from vitscale.rng import derive_seed
from vitscale.schedule import learning_rate

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit status: stopped after a clean save, start it again
SHOWN_IMAGES = 16


def train(config: TrainConfig) -> int:
    """Run the config to its end, resuming what is there. Every rank calls it. Returns the exit status: 0, or
    75.

    Raises ConfigError, DataError or CheckpointError (all ValueErrors) for what the user can mend.
    """
    distributed.initialize()
    job = prepare(config, distributed.world_size())
    tasks = {
        name: open_task(name, section, config.model.image_size) for name, section in config.evals.items()
    }
    lock = claim_run_dir(job)
    stop = StopFlag()
    run = start(job)
    write_config(job)
    with run.saver:
        loop(job, run, tasks, stop)
    distributed.barrier()  # a launcher may end all ranks when the first has ended with another status than 0
    if lock:
        lock.release()
    return 0 if run.progress.step == job.total_steps else PREEMPTED


def loop(job: Job, run: "Run", tasks: Mapping[str, FewShotTask | ClassifyTask], stop: "StopFlag") -> None:
    """Train from where the run is to its end, or to where it is asked to stop; every rank calls it."""
    config, engine, progress, saver = job.config, run.engine, run.progress, run.saver
    writer = open_metrics(job, progress.step)
    stream = open_stream(job, progress.step)
    if progress.step == 0:
        if writer:
            writer.write_hparams(configs.to_dict(config))
        evaluate_due(run, job, tasks, 0, writer)  # what an untrained model gives: the line to beat
    meter = Meter(job)

    for step in range(progress.step + 1, job.total_steps + 1):
        with meter.waiting_for_data():
            batch = next(stream)
        lr = learning_rate(step, job.total_steps, config.optim.lr, config.schedule)
        engines.set_learning_rate(engine, lr)
        loss = train_step(engine, job, batch, step)
        if run.ema:
            run.ema.update(engine)
        meter.add(batch)
        progress.step = step
        stopping, save_failed = agreed(stop.asked, saver.failed)
        if save_failed:
            saver.wait()  # raises

        last = step == job.total_steps
        if step == 1 or last or stopping or step % config.log.every_steps == 0:
            numbers = meter.read(engine, loss, lr, progress)
            if writer:
                writer.write(step, numbers)
        if step == 1 and writer:
            writer.write_images("inputs", batch.images[:SHOWN_IMAGES], step)
        for cost in saver.finished():
            if writer:
                writer.write(step, cost)
        if evaluate_due(run, job, tasks, step, writer):
            meter.restart()
        damaged = too_many_bad(job, progress)
        due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
        if last or stopping or damaged or due:
            meter.count_bad(progress)
            saver.save(engine, checkpoint_header(job, engine, progress), run.ema)
            meter.restart()
        if damaged:
            raise DataError(bad_data_sentence(job, progress))
        if stopping and not last:
            break
    saver.wait()
    stream.close()
    if writer:
        for cost in saver.finished():
            writer.write(progress.step, cost)
        writer.close()


def train_step(engine: Any, job: Job, batch: Batch, step: int) -> Tensor:
    """One optimizer step on this rank's part of a global batch. Returns its mean loss, fp32 on the device."""
    config, augment = job.config, job.config.augment
    total = torch.zeros((), device=distributed.device())
    micro_batches = zip(
        batch.images.split(job.plan.micro_batch), batch.labels.split(job.plan.micro_batch), strict=True
    )
    position = distributed.rank() * job.plan.per_rank
    for micro_step, (images, labels) in enumerate(micro_batches):
        if config.model.dropout:
            torch.manual_seed(derive_seed(config.seed, "dropout", step, distributed.rank(), micro_step))
        pixels, targets = mix(
            normalize(images, torch.float32),
            to_targets(labels, config.model.num_classes),
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            switch=augment.cutmix_share,
            seed=config.seed,
            step=step,
            first_position=position + micro_step * job.plan.micro_batch,
        )
        logits = engine(pixels.to(engines.DTYPES[config.precision]))
        loss = compute_loss(config.loss, logits, targets)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / job.plan.grad_accum_steps
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What lives as long as the loop: the engine, the average of its weights, its checkpoints, where
    it is.
    """

    engine: Any
    ema: Ema | None
    saver: Saver
    progress: Progress


def start(job: Job) -> Run:
    """Build the engine with the weights and state that the start order gives it; every rank calls it."""
    config = job.config
    home = Home.of(config.run_dir, config.checkpoint)
    found = load.find(home)
    passed_over = found.passed_over if found else ()
    if found:
        check_continuation(job, found)
    elif config.init.full_state:
        found = load.verified(config.init.checkpoint)
        check_new_length(job, found)
    model = initial_model(config, resumed=found is not None)
    initial = {} if found else {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(config.optim, model)
    engine = engines.start_engine(model, optimizer, config.engine, job.plan, job.deepspeed_config)
    if not found and config.precision != "fp32":
        # DeepSpeed makes the fp32 masters from 16-bit weights: give them back what rounding took
        state.restore(engine, state.WholeTensors(initial), (), 0)
    ema = Ema(engine, config.optim.ema_decay) if config.optim.ema_decay else None
    progress = Progress()
    if found:
        load.resume(engine, found, config.optim.name, ema)
        if distributed.is_main():
            ranks, stage = found.manifest.world_size, found.manifest.zero_stage
            logger.info("resumed from %s, written by %d ranks at ZeRO %d", found.folder, ranks, stage)
        progress = Progress(step=found.manifest.step, bad_samples=found.manifest.counters["bad_samples"])
    saver = Saver(home, config.checkpoint, config.optim.name, passed_over)
    return Run(engine=engine, ema=ema, saver=saver, progress=progress)


def initial_model(config: TrainConfig, *, resumed: bool) -> ViT:
    """The model on the CPU: initialised from the seed; unless `resumed`, with the backbone of [init] if there
    is one. What optim.freeze names is frozen.
    """
    model = build_model(config.model, seed=derive_seed(config.seed, "init"))
    freeze(model, config.optim.freeze)
    if config.init.checkpoint and not resumed:
        weights: State = "ema" if config.init.ema else "fp32"
        path, _ = load.on_main(lambda: locate(config.init.checkpoint, weights))
        saved = SavedModel(path, state=weights)
        backbone = transfer_state(saved.state(), saved.config, config.model)
        unexpected = model.load_state_dict(backbone, strict=False).unexpected_keys
        assert not unexpected, unexpected
        if distributed.is_main():
            logger.info("initialised %d tensors from %s (step %d)", len(backbone), saved.path, saved.step)
    return model


def open_metrics(job: Job, step: int) -> MetricsWriter | None:
    """The writer of rank 0, with rows past `step` dropped; None on other ranks."""
    if not distributed.is_main():
        return None
    config = job.config
    trim_metrics(Path(config.run_dir) / QUARANTINE_NAME, step)
    return MetricsWriter(
        config.run_dir, resume_step=step, total_steps=job.total_steps, tensorboard=config.log.tensorboard
    )


def open_stream(job: Job, step: int) -> Generator[Batch, None, None]:
    """This rank's batches from `step` to the end of the run."""
    config = job.config
    cache = NodeCache(config.engine.cache_dir, int(config.engine.cache_gb * 1e9))
    stream = Stream(
        sources=job.sources,
        mixture=job.mixture,
        recipe=Recipe(config.augment, job.decoder, config.model.image_size, config.model.num_classes),
        lanes=job.mixture.rank_lanes(distributed.rank(), job.plan.world_size),
        first_step=step,
        last_step=job.total_steps,
        cache=cache if config.engine.cache_dir else None,
    )
    return on_device(batches(stream, config.engine.num_workers), distributed.device())


def checkpoint_header(job: Job, engine: Any, progress: Progress) -> dict[str, Any]:
    """The trainer's part of a checkpoint's manifest."""
    config = job.config
    epoch, step_in_epoch = divmod(progress.step, job.mixture.steps_per_epoch)
    return {
        "step": progress.step,
        "samples_seen": progress.step * config.global_batch,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "data_fingerprint": job.data_fingerprint(),
        "precision": config.precision,
        "counters": {**state.counters(engine), "bad_samples": progress.bad_samples},
        "config": configs.to_dict(config),
        "versions": {
            name: importlib.metadata.version(name) for name in ("vitscale", "torch", "deepspeed", "numpy")
        },
    }


def evaluate_due(
    run: Run,
    job: Job,
    tasks: Mapping[str, FewShotTask | ClassifyTask],
    step: int,
    writer: MetricsWriter | None,
) -> bool:
    """Run the evaluations that fall due at this step, every rank taking part, with the average of the weights
    where there is one. Returns whether any were.
    """
    due = {
        name: task
        for name, task in tasks.items()
        if step % task.config.every_steps == 0 or step == job.total_steps
    }
    with run.ema.in_place(run.engine) if run.ema and due else contextlib.nullcontext():
        for name, task in due.items():
            results = task.run(EngineModel(run.engine, job.config))
            if writer:
                writer.write(step, {f"eval/{name}/{key}": value for key, value in results.items()})
    return bool(due)


class EngineModel:
    """The model in training, as evaluations see it: uint8 images in, float32 out, dropout off."""

    def __init__(self, engine: Any, config: TrainConfig) -> None:
        self._engine, self._dtype = engine, engines.DTYPES[config.precision]
        self.image_size, self.num_classes = config.model.image_size, config.model.num_classes

    def features(self, images: Tensor) -> Tensor:
        return self._run(images, features_only=True)

    def logits(self, images: Tensor) -> Tensor:
        return self._run(images, features_only=False)

    @torch.no_grad()
    def _run(self, images: Tensor, *, features_only: bool) -> Tensor:
        self._engine.eval()
        try:
            pixels = normalize(images.to(distributed.device()), self._dtype)
            return self._engine.module(pixels, features_only=features_only).float()
        finally:
            self._engine.train()


class StopFlag:
    """SIGTERM and SIGUSR1 ask for a clean stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def agreed(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank: all ranks act on it at the same step. Every rank calls
    it.
    """
    return [value > 0 for value in distributed.all_reduce_max([float(flag) for flag in flags])]
