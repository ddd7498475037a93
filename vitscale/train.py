"""Training: the whole configuration, and one straight loop. Fine-tuning is the same loop with an [init] section.

Start order: 1 resume this run from its newest good checkpoint; 2 initialise weights from another checkpoint ([init], with a
new head and resized position embeddings); 3 from scratch.
"""

import dataclasses
import importlib.metadata
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale import config as configs
from vitscale import distributed, storage
from vitscale import engine as engines
from vitscale.checkpoint import load, state, store
from vitscale.checkpoint.export import SavedModel
from vitscale.checkpoint.format import Manifest
from vitscale.config import ConfigError
from vitscale.data.index import DataError, Index, check_shards
from vitscale.data.loader import Batch, DataConfig, Stream, batches, check_labels, make_order
from vitscale.data.order import DIGEST_MASK, Order, digest
from vitscale.data.transforms import AugmentConfig, normalize
from vitscale.engine import BatchPlan, EngineConfig, Precision
from vitscale.evals.tasks import ClassifyTask, EvalConfig, FewShotTask, open_task
from vitscale.losses import LossConfig, compute_loss, to_targets
from vitscale.metrics import MetricsWriter
from vitscale.models import build_model
from vitscale.models.flops import train_flops
from vitscale.models.transfer import transfer_state
from vitscale.models.vit import ModelConfig, ViT
from vitscale.optim import OptimConfig, build_optimizer
from vitscale.rng import derive_seed
from vitscale.schedule import ScheduleConfig, learning_rate

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit status: stopped after a clean save, start it again
MIN_SAMPLES_FOR_BAD_FRACTION = 1000
# What a resumed run may change: where it lies, speed, logging, saving, evaluation, and a longer total.
CHANGEABLE = ("run_dir", "engine", "log", "checkpoint", "evals", "total_steps", "total_epochs", "total_samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often a row is written to the console, TensorBoard and metrics.jsonl ([log])."""

    every_steps: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        configs.positive("log", every_steps=self.every_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights to begin with ([init]): a run, a step directory or an export; "" = from scratch."""

    checkpoint: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, whole. Exactly one of the totals is above 0; epochs may be fractional."""

    run_dir: str
    seed: int = 0
    global_batch: int = 1024
    total_steps: int = 0
    total_epochs: float = 0.0
    total_samples: int = 0
    precision: Precision = "fp32"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: store.CheckpointConfig = dataclasses.field(default_factory=store.CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    evals: dict[str, EvalConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        configs.positive("config", global_batch=self.global_batch)
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")
        totals = {name: getattr(self, name) for name in ("total_steps", "total_epochs", "total_samples")}
        given = [f"{name} = {value}" for name, value in totals.items() if value]
        if len(given) != 1 or min(totals.values()) < 0:
            raise ConfigError(
                f"set exactly one of total_steps, total_epochs, total_samples, above 0; here: {', '.join(given) or 'none'}"
            )
        if not self.data.index:
            raise ConfigError(
                "data.index is missing: name the index.json of the training shards; "
                "make one with: python tools/data.py index SHARDS"
            )
        if self.data.labels == "multi" and self.loss.name == "softmax":
            raise ConfigError('data.labels = "multi" needs loss.name = "sigmoid": softmax takes one class per image')
        if self.model.num_classes < 1:
            raise ConfigError("model.num_classes must be 1 or more to train: 0 builds a model without a head")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run. Raises ConfigError where the schedule does not fit in."""
        steps = self.total_steps or self.total_samples // self.global_batch or round(self.total_epochs * steps_per_epoch)
        if steps < 1:
            raise ConfigError(f"the run has no whole step: total_samples {self.total_samples} < global_batch {self.global_batch}")
        if self.schedule.warmup_steps >= steps:
            raise ConfigError(
                f"schedule.warmup_steps {self.schedule.warmup_steps:,} must be below the run's {steps:,} steps; lower it"
            )
        return steps


@dataclasses.dataclass(frozen=True)
class Job:
    """What follows from a config, its data and the world: nothing in it is on a device yet."""

    config: TrainConfig
    index: Index
    order: Order
    plan: BatchPlan
    total_steps: int
    deepspeed_config: dict[str, Any]


@dataclasses.dataclass
class Progress:
    """Where the run is: `step` optimizer steps are done, `bad_samples` were replaced so far."""

    step: int = 0
    bad_samples: int = 0


def prepare(config: TrainConfig, world_size: int) -> Job:
    """Derive the job, and refuse what does not fit together, before any expensive work."""
    index = Index.load(config.data.index)
    check_shards(index)
    check_labels(index, config.data, config.model.num_classes)
    order = make_order(index, config.data, config.seed, config.global_batch)
    order.rank_lanes(0, world_size)
    plan = engines.plan_batches(config.global_batch, config.engine.micro_batch, world_size)
    total_steps = config.num_steps(order.steps_per_epoch)
    ds_config = engines.deepspeed_config(config.engine, plan, config.precision, config.optim.clip_norm)
    return Job(config, index, order, plan, total_steps, ds_config)


def train(config: TrainConfig) -> int:
    """Run the config to its end, resuming what is there. Every rank calls it. Returns the exit status: 0, or 75.

    Raises ConfigError, DataError or CheckpointError (all ValueErrors) for what the user can mend.
    """
    distributed.initialize()
    job = prepare(config, distributed.world_size())
    tasks = {name: open_task(name, section, config.model.image_size) for name, section in config.evals.items()}
    claim_run_dir(job)
    stop = StopFlag()
    engine, progress = start(job)
    writer = open_metrics(job, progress.step)
    stream = open_stream(job, progress.step)
    if progress.step == 0:
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
        if last or stopping or step % config.log.every_steps == 0:
            numbers = meter.read(engine, loss, lr, progress)
            if writer:
                writer.write(step, numbers)
        evaluate_due(engine, job, tasks, step, writer)
        too_many_bad = progress.bad_samples > config.data.max_bad_fraction * max(
            step * config.global_batch, MIN_SAMPLES_FOR_BAD_FRACTION
        )
        due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
        if last or stopping or too_many_bad or due:
            save(engine, job, progress)
            meter.restart()
        if too_many_bad:
            raise DataError(bad_data_sentence(job, progress))
        if stopping and not last:
            break
    if writer:
        writer.close()
    return 0 if progress.step == job.total_steps else PREEMPTED


def train_step(engine: Any, job: Job, batch: Batch, step: int) -> Tensor:
    """One optimizer step on this rank's part of a global batch. Returns its mean loss, fp32 on the device."""
    config, device = job.config, distributed.device()
    total = torch.zeros((), device=device)
    images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    micro_batches = zip(images.split(job.plan.micro_batch), labels.split(job.plan.micro_batch), strict=True)
    for micro_step, (micro_images, micro_labels) in enumerate(micro_batches):
        if config.model.dropout:
            torch.manual_seed(derive_seed(config.seed, "dropout", step, distributed.rank(), micro_step))
        logits = engine(normalize(micro_images, engines.DTYPES[config.precision]))
        loss = compute_loss(config.loss, logits, to_targets(micro_labels, config.model.num_classes))
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
    model = initial_model(config, from_scratch=found is not None)
    initial = {} if found or config.precision == "fp32" else {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(config.optim, model)
    engine = engines.start_engine(model, optimizer, config.engine, job.plan, job.deepspeed_config)
    if not found:
        if initial:  # DeepSpeed makes the fp32 masters from 16-bit weights: give them back what rounding took
            state.restore(engine, state.WholeTensors(initial), (), 0)
        return engine, Progress()
    directory, manifest = found
    load.resume(engine, directory, manifest)
    if distributed.is_main():
        logger.info("resumed from %s, written by %d ranks at ZeRO %d", directory, manifest.world_size, manifest.zero_stage)
    return engine, Progress(step=manifest.step, bad_samples=manifest.counters["bad_samples"])


def initial_model(config: TrainConfig, *, from_scratch: bool) -> ViT:
    """The model on the CPU: initialised from the seed, and with the backbone of [init] where there is one."""
    model = build_model(config.model, seed=derive_seed(config.seed, "init"))
    if config.init.checkpoint and not from_scratch:
        saved = SavedModel(config.init.checkpoint)
        backbone = transfer_state(saved.state(), saved.config, config.model)
        unexpected = model.load_state_dict(backbone, strict=False).unexpected_keys
        assert not unexpected, unexpected
        if distributed.is_main():
            logger.info("initialised %d tensors from %s (step %d)", len(backbone), saved.path, saved.step)
    return model


def claim_run_dir(job: Job) -> None:
    """Write the resolved config into the run directory; refuse it if another experiment is in there. Every rank calls it."""
    error = ""
    if distributed.is_main():
        path = Path(job.config.run_dir) / "config.toml"
        try:
            if path.exists():
                error = _difference(configs.load(TrainConfig, [path]), job)
            if not error:
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomic(path, configs.to_toml(job.config).encode())
        except OSError as failure:
            error = f"run_dir {job.config.run_dir} cannot be written: {failure.strerror}; choose another"
    error = distributed.broadcast_json(error)
    if error:
        raise ConfigError(error)


def check_continuation(job: Job, directory: Path, manifest: Manifest) -> None:
    """Raise ConfigError if the data behind the run are not those that the checkpoint was trained on."""
    fingerprint = job.order.fingerprint(job.index.fingerprint())
    if manifest.data_fingerprint != fingerprint:
        raise ConfigError(
            f"{directory} was trained on other data than {job.config.data.index} holds now (shards, their order or chunking "
            f"changed), so it cannot go on where it stopped; restore the shards and index, or start a new run_dir with "
            f"[init] checkpoint"
        )
    if manifest.step > job.total_steps:
        raise ConfigError(f"{directory} is beyond the run's {job.total_steps:,} steps; raise the total or use another run_dir")


def open_metrics(job: Job, step: int) -> MetricsWriter | None:
    """The writer of rank 0, with rows past `step` dropped; None on other ranks."""
    if not distributed.is_main():
        return None
    config = job.config
    return MetricsWriter(config.run_dir, resume_step=step, total_steps=job.total_steps, tensorboard=config.log.tensorboard)


def open_stream(job: Job, step: int) -> Iterator[Batch]:
    """This rank's batches from `step` to the end of the run."""
    config = job.config
    stream = Stream(
        index=job.index,
        order=job.order,
        augment=config.augment,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        lanes=job.order.rank_lanes(distributed.rank(), job.plan.world_size),
        first_step=step,
        last_step=job.total_steps,
    )
    return batches(stream, config.engine.num_workers)


def save(engine: Any, job: Job, progress: Progress) -> None:
    """Write a checkpoint and apply retention; every rank calls it."""
    config = job.config
    epoch, step_in_epoch = divmod(progress.step, job.order.steps_per_epoch)
    header = {
        "step": progress.step,
        "samples_seen": progress.step * config.global_batch,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "data_fingerprint": job.order.fingerprint(job.index.fingerprint()),
        "precision": config.precision,
        "counters": {**state.counters(engine), "bad_samples": progress.bad_samples},
        "config": configs.to_dict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("vitscale", "torch", "deepspeed", "numpy")},
    }
    directory = store.directory_of(config.run_dir)
    store.save(engine, directory, config.optim.name, header)
    if distributed.is_main():
        store.apply_retention(directory, config.checkpoint)


def evaluate_due(
    engine: Any, job: Job, tasks: Mapping[str, FewShotTask | ClassifyTask], step: int, writer: MetricsWriter | None
) -> None:
    """Run the evaluations that fall due at this step; every rank takes part."""
    for name, task in tasks.items():
        if step % task.config.every_steps == 0 or step == job.total_steps:
            results = task.run(EngineModel(engine, job.config))
            if writer:
                writer.write(step, {f"eval/{name}/{key}": value for key, value in results.items()})


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


class Meter:
    """Turns what happened since the last logged step into the numbers of one row."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._flops = train_flops(job.config.model)
        self._peak = engines.peak_flops()
        self._quarantine = Path(job.config.run_dir) / "quarantine.jsonl"
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
        total_digest, bad = distributed.all_reduce_sum_int([self._digest, len(self._bad)])
        progress.bad_samples += bad
        if bad:
            self._report_bad(progress.step)
        speed = self._steps * config.global_batch / elapsed
        numbers = {
            "samples_seen": progress.step * config.global_batch,
            "epoch": progress.step / self._job.order.steps_per_epoch,
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

    def _report_bad(self, step: int) -> None:
        sentences = [sentence for part in distributed.gather_json(self._bad) for sentence in part]
        self._bad = []
        if distributed.is_main():
            logger.warning("%d samples could not be used and were replaced, the first: %s", len(sentences), sentences[0])
            with open(self._quarantine, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "sample": sentence}) + "\n" for sentence in sentences)


def bad_data_sentence(job: Job, progress: Progress) -> str:
    seen = progress.step * job.config.global_batch
    return (
        f"{progress.bad_samples:,} of {seen:,} samples could not be used, more than data.max_bad_fraction "
        f"{job.config.data.max_bad_fraction} allows; they are listed in {job.config.run_dir}/quarantine.jsonl. A checkpoint was "
        f"saved at step {progress.step}: mend the shards and index them again, or raise the fraction"
    )


def expected_first_loss(config: TrainConfig) -> float:
    """Loss of the zero-initialised head, with one positive label per image (ln C, or C softplus(b) - b)."""
    if config.loss.name == "softmax":
        return math.log(config.model.num_classes)
    bias = config.model.head_bias
    return config.model.num_classes * math.log1p(math.exp(bias)) - bias


def _difference(old: TrainConfig, job: Job) -> str:
    """Why the run directory's config forbids this job; "" if it may go on."""
    new = job.config
    pinned = [{k: v for k, v in configs.to_dict(c).items() if k not in CHANGEABLE} for c in (old, new)]
    keys = list(configs.differing_keys(*pinned))
    if keys:
        changes = ", ".join(f"{key} was {_value(old, key)!r}, now {_value(new, key)!r}" for key in keys)
        return (
            f"run_dir {new.run_dir} holds another experiment: {changes}; set them back to resume it, or choose another run_dir"
        )
    before = old.num_steps(job.order.steps_per_epoch)
    if before > job.total_steps:
        return f"run_dir {new.run_dir} was started for {before:,} steps and cannot be shortened to {job.total_steps:,}"
    return ""


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config
