"""Training: one straight loop. Fine-tuning is the same loop with an [init] section.

Start order: 1 resume this run from its newest good checkpoint; 2 initialise weights from another checkpoint
([init], with a new head and resized position embeddings); 3 from scratch.
"""

import importlib.metadata
import logging
import signal
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from vitscale import config as configs
from vitscale import distributed
from vitscale import engine as engines
from vitscale.checkpoint import load, state, store
from vitscale.checkpoint.export import SavedModel
from vitscale.data.cache import NodeCache
from vitscale.data.index import DataError
from vitscale.data.lane import Recipe
from vitscale.data.loader import Batch, Stream, batches, on_device
from vitscale.data.mixup import mix
from vitscale.data.transforms import normalize
from vitscale.evals.tasks import ClassifyTask, FewShotTask, open_task
from vitscale.job import Job, TrainConfig, check_continuation, claim_run_dir, prepare
from vitscale.losses import compute_loss, to_targets
from vitscale.meter import Meter, Progress, bad_data_sentence, too_many_bad
from vitscale.metrics import MetricsWriter
from vitscale.models import build_model
from vitscale.models.transfer import transfer_state
from vitscale.models.vit import ViT
from vitscale.optim import build_optimizer
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
    claim_run_dir(job)
    stop = StopFlag()
    engine, progress = start(job)
    writer = open_metrics(job, progress.step)
    stream = open_stream(job, progress.step)
    if progress.step == 0:
        if writer:
            writer.write_hparams(configs.to_dict(config))
        evaluate_due(engine, job, tasks, 0, writer)  # what an untrained model gives: the line to beat
    meter = Meter(job)

    for step in range(progress.step + 1, job.total_steps + 1):
        with meter.waiting_for_data():
            batch = next(stream)
        lr = learning_rate(step, job.total_steps, config.optim.lr, config.schedule)
        engines.set_learning_rate(engine, lr)
        loss = train_step(engine, job, batch, step)
        meter.add(batch)
        progress.step = step
        stopping = stop.agreed()

        last = step == job.total_steps
        if step == 1 or last or stopping or step % config.log.every_steps == 0:
            numbers = meter.read(engine, loss, lr, progress)
            if writer:
                writer.write(step, numbers)
        if step == 1 and writer:
            writer.write_images("inputs", batch.images[:SHOWN_IMAGES], step)
        if evaluate_due(engine, job, tasks, step, writer):
            meter.restart()
        damaged = too_many_bad(job, progress)
        due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
        if last or stopping or damaged or due:
            meter.count_bad(progress)
            save(engine, job, progress)
            meter.restart()
        if damaged:
            raise DataError(bad_data_sentence(job, progress))
        if stopping and not last:
            break
    stream.close()
    if writer:
        writer.close()
    return 0 if progress.step == job.total_steps else PREEMPTED


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


def start(job: Job) -> tuple[Any, Progress]:
    """Build the engine with the weights and state that the start order gives it; every rank calls it."""
    config = job.config
    found = load.find(config.run_dir)
    if found:
        check_continuation(job, *found)
    model = initial_model(config, resumed=found is not None)
    initial = (
        {}
        if found or config.precision == "fp32"
        else {n: p.detach().clone() for n, p in model.named_parameters()}
    )
    optimizer = build_optimizer(config.optim, model)
    engine = engines.start_engine(model, optimizer, config.engine, job.plan, job.deepspeed_config)
    if not found:
        # DeepSpeed makes the fp32 masters from 16-bit weights: give them back what rounding took
        if initial:
            state.restore(engine, state.WholeTensors(initial), (), 0)
        return engine, Progress()
    directory, manifest = found
    load.resume(engine, directory, manifest)
    if distributed.is_main():
        logger.info(
            "resumed from %s, written by %d ranks at ZeRO %d",
            directory,
            manifest.world_size,
            manifest.zero_stage,
        )
    return engine, Progress(step=manifest.step, bad_samples=manifest.counters["bad_samples"])


def initial_model(config: TrainConfig, *, resumed: bool) -> ViT:
    """The model on the CPU: initialised from the seed; unless `resumed`, with the backbone of [init] if there
    is one.
    """
    model = build_model(config.model, seed=derive_seed(config.seed, "init"))
    if config.init.checkpoint and not resumed:
        saved = SavedModel(config.init.checkpoint)
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


def save(engine: Any, job: Job, progress: Progress) -> None:
    """Write a checkpoint and apply retention; every rank calls it."""
    config = job.config
    epoch, step_in_epoch = divmod(progress.step, job.mixture.steps_per_epoch)
    header = {
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
    directory = store.directory_of(config.run_dir)
    store.save(engine, directory, config.optim.name, header)
    if distributed.is_main():
        store.apply_retention(directory, config.checkpoint)


def evaluate_due(
    engine: Any,
    job: Job,
    tasks: Mapping[str, FewShotTask | ClassifyTask],
    step: int,
    writer: MetricsWriter | None,
) -> bool:
    """Run the evaluations that fall due at this step, every rank taking part. Returns whether any were."""
    due = {
        name: task
        for name, task in tasks.items()
        if step % task.config.every_steps == 0 or step == job.total_steps
    }
    for name, task in due.items():
        results = task.run(EngineModel(engine, job.config))
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
    """SIGTERM and SIGUSR1 ask for a clean stop; all ranks agree on the step, so that they save together."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked; every rank calls it once a step."""
        return distributed.all_reduce_max([float(self._asked)])[0] > 0
