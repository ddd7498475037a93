"""A training run before it runs: the configuration, and what follows from it, the data and the world."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale import distributed, storage
from vitscale import engine as engines
from vitscale.checkpoint import store
from vitscale.checkpoint.load import Found
from vitscale.checkpoint.lock import RunLock
from vitscale.checkpoint.store import CheckpointConfig
from vitscale.config import ConfigError
from vitscale.data.decode import Decoder, resolve_decoder
from vitscale.data.index import DataError
from vitscale.data.mix import Mixture
from vitscale.data.sources import (
    DataConfig,
    Source,
    check_labels,
    check_sources,
    make_mixture,
    open_sources,
)
from vitscale.data.transforms import AugmentConfig
from vitscale.engine import BatchPlan, EngineConfig, Precision
from vitscale.evals.tasks import EvalConfig
from vitscale.losses import LossConfig
from vitscale.models.vit import ModelConfig
from vitscale.optim import OptimConfig
from vitscale.schedule import ScheduleConfig

# What a resumed run may change: where it lies, speed, logging, saving, evaluation, and a longer total.
CHANGEABLE = (
    "run_dir",
    "engine",
    "log",
    "checkpoint",
    "evals",
    "total_steps",
    "total_epochs",
    "total_samples",
)
# What names places: the data's fingerprint says what lies there, and [init] was read long ago.
PLACES = ("data", "init")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often a row is written to the console, TensorBoard and metrics.jsonl ([log])."""

    every_steps: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        configs.positive("log", every_steps=self.every_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What to begin with ([init]): a run, a step directory or an export; "" = from scratch.

    full_state: go on from that run's step with its optimizer state too, under this config (another learning
    rate, other data, a longer schedule); otherwise take its weights alone. ema: of the weights, take the
    average over training.
    """

    checkpoint: str = ""
    full_state: bool = False
    ema: bool = False

    def __post_init__(self) -> None:
        if (self.full_state or self.ema) and not self.checkpoint:
            key = "full_state" if self.full_state else "ema"
            raise ConfigError(f"init.{key} = true needs init.checkpoint: the run to begin with")
        if self.full_state and self.ema:
            raise ConfigError("init.full_state takes the average along; leave init.ema out")


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
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
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
                "set exactly one of total_steps, total_epochs, total_samples, above 0; here: "
                f"{', '.join(given) or 'none'}"
            )
        if not self.data.index and not self.data.sources:
            raise ConfigError(
                "data.index is missing: name the index.json of the training shards (or several in "
                "[[data.sources]]); make one with: python tools/data.py index SHARDS"
            )
        if self.total_epochs and len(self.data.sources) > 1:
            raise ConfigError(
                f"total_epochs = {self.total_epochs} has no meaning for several data.sources, each of which "
                "has its own epochs; use total_steps or total_samples"
            )
        if self.augment.repeats > 1 and self.global_batch % self.augment.repeats:
            raise ConfigError(
                f"global_batch {self.global_batch} is not a multiple of augment.repeats "
                f"{self.augment.repeats}; use "
                f"{self.global_batch // self.augment.repeats * self.augment.repeats}"
            )
        if self.data.labels == "multi" and self.loss.name == "softmax":
            raise ConfigError(
                'data.labels = "multi" needs loss.name = "sigmoid": softmax takes one class per image'
            )
        if self.model.num_classes < 1:
            raise ConfigError("model.num_classes must be 1 or more to train: 0 builds a model without a head")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run. Raises ConfigError where the schedule does not fit in."""
        steps = (
            self.total_steps
            or self.total_samples // self.global_batch
            or round(self.total_epochs * steps_per_epoch)
        )
        if steps < 1:
            raise ConfigError(
                f"the run has no whole step: total_samples {self.total_samples} < global_batch "
                f"{self.global_batch}"
            )
        if self.schedule.warmup_steps >= steps:
            raise ConfigError(
                f"schedule.warmup_steps {self.schedule.warmup_steps:,} must be below the run's {steps:,} "
                "steps; lower it"
            )
        return steps


@dataclasses.dataclass(frozen=True)
class Job:
    """What follows from a config, its data and the world: nothing in it is on a device yet."""

    config: TrainConfig
    sources: tuple[Source, ...]
    mixture: Mixture
    decoder: Decoder
    plan: BatchPlan
    total_steps: int
    deepspeed_config: dict[str, Any]

    def data_fingerprint(self) -> str:
        """Names what every step reads and the decoder that reads it: "HASH-DECODER"."""
        order = self.mixture.fingerprint([source.fingerprint() for source in self.sources])
        return f"{order}-{self.decoder}"


def prepare(config: TrainConfig, world_size: int) -> Job:
    """Derive the job, and refuse what does not fit together, before any expensive work.

    Every rank calls it.
    """
    sources = open_sources(config.data)
    _check_once(sources)
    check_labels(sources, config.data, config.model.num_classes)
    mixture = make_mixture(
        sources,
        config.data,
        seed=config.seed,
        global_batch=config.global_batch,
        repeats=config.augment.repeats,
    )
    mixture.rank_lanes(0, world_size)
    plan = engines.plan_batches(config.global_batch, config.engine.micro_batch, world_size)
    _check_pairs(config, plan, mixture)
    return Job(
        config=config,
        sources=sources,
        mixture=mixture,
        decoder=resolve_decoder(config.data.decoder),
        plan=plan,
        total_steps=config.num_steps(mixture.steps_per_epoch),
        deepspeed_config=engines.deepspeed_config(
            config.engine, plan, config.precision, config.optim.clip_norm
        ),
    )


def _check_once(sources: tuple[Source, ...]) -> None:
    """Look every shard up, on one rank: thousands of ranks would ask a shared store millions of times."""
    error = ""
    if distributed.is_main():
        try:
            check_sources(sources)
        except (DataError, ConfigError) as failure:
            error = str(failure)
    error = distributed.broadcast_json(error)
    if error:
        raise DataError(error)


def _check_pairs(config: TrainConfig, plan: BatchPlan, mixture: Mixture) -> None:
    """mixup and cutmix mix neighbours in the batch: both must be in one micro batch, and not one sample."""
    if not config.augment.mixup and not config.augment.cutmix:
        return
    if plan.micro_batch % 2:
        raise ConfigError(
            f"augment.mixup and augment.cutmix pair neighbours, so the micro batch of {plan.micro_batch} "
            "must be even; change engine.micro_batch, global_batch or the number of processes"
        )
    if mixture.repeats > 1 and mixture.draws_per_step % 2:
        raise ConfigError(
            f"with augment.repeats = {mixture.repeats}, mixup and cutmix need an even number of samples of "
            "each "
            f"lane in a step, not {mixture.draws_per_step}; use data.lanes = 0, or half as many"
        )


def claim_run_dir(job: Job) -> RunLock | None:
    """Lock the run directory; refuse it if another job holds it, or if another experiment is in there, or if
    its checkpoints are where this config does not look. Every rank calls it. Returns the lock, which rank 0
    holds until it releases it.
    """
    lock = None

    def claim() -> None:
        nonlocal lock
        path = _config_file(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path.parent)
        if path.exists():
            old = configs.load(TrainConfig, [path])
            error = _difference(f"run_dir {path.parent}", old, job) or _left_behind(old, job)
            if error:
                raise ConfigError(error)

    _on_main(job, claim)
    if distributed.local_rank() == 0:  # with checkpoint.store the directory may be each node's own
        store.clean(store.directory_of(job.config.run_dir))
    return lock


def write_config(job: Job) -> None:
    """Write the resolved config into the run directory, once a job has started there: a mistake at the first
    start binds nobody. Every rank calls it.
    """
    _on_main(job, lambda: storage.write_atomic(_config_file(job), configs.to_toml(job.config).encode()))


def _config_file(job: Job) -> Path:
    return Path(job.config.run_dir) / "config.toml"


def _on_main(job: Job, action: Callable[[], None]) -> None:
    """Do something to the run directory on rank 0; what the user can mend is a ConfigError on every rank."""
    error = ""
    if distributed.is_main():
        try:
            action()
        except ConfigError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"run_dir {job.config.run_dir} cannot be written: {failure.strerror}; choose another"
    error = distributed.broadcast_json(error)
    if error:
        raise ConfigError(error)


def check_continuation(job: Job, found: Found) -> None:
    """Raise ConfigError if the checkpoint is not of this experiment: run directories that name one store
    share its checkpoints; or if the data behind the run are not those that it was trained on.
    """
    fingerprint = job.data_fingerprint()
    (was, _, old_decoder), (now, _, decoder) = (
        text.partition("-") for text in (found.manifest.data_fingerprint, fingerprint)
    )
    if was != now:
        raise ConfigError(
            f"{found.folder} was trained on other data than the config names now (shards, their order or "
            "chunking, label maps or exclusions changed), so it cannot go on where it stopped; restore the "
            "shards and index, or start a new run_dir with [init] checkpoint"
        )
    if old_decoder != decoder:
        raise ConfigError(
            f"{found.folder} was trained with the JPEG decoder {old_decoder}, here it is {decoder}; set "
            f'data.decoder = "{old_decoder}" (turbojpeg needs: pip install turbojpeg)'
        )
    difference = _difference(found.folder, configs.from_dict(TrainConfig, found.manifest.config), job, PLACES)
    if difference:
        raise ConfigError(difference)
    check_length(job, found)


def check_length(job: Job, found: Found) -> None:
    """Raise ConfigError if the checkpoint lies beyond the end of the run."""
    if found.manifest.step > job.total_steps:
        raise ConfigError(
            f"{found.folder} is beyond the run's {job.total_steps:,} steps; raise the total or use another "
            "run_dir"
        )


def check_new_length(job: Job, found: Found) -> None:
    """Raise ConfigError if another run's checkpoint leaves this one nothing to do, and so nothing to save."""
    if found.manifest.step >= job.total_steps:
        raise ConfigError(
            f"{found.folder}, with which init.full_state goes on, has done all of the run's "
            f"{job.total_steps:,} steps; raise the total, or take its weights alone: init.full_state = false"
        )


def expected_first_loss(config: TrainConfig) -> float:
    """Loss of the zero-initialised head, with one positive label per image (ln C, or C softplus(b) - b)."""
    if config.loss.name == "softmax":
        return math.log(config.model.num_classes)
    bias = config.model.head_bias
    return config.model.num_classes * math.log1p(math.exp(bias)) - bias


def _left_behind(old: TrainConfig, job: Job) -> str:
    """Why checkpoint.store may not be another one now; "" if nothing newer lies in the old one."""
    new = job.config
    if old.checkpoint.store == new.checkpoint.store:
        return ""
    before, now = (store.Home.of(new.run_dir, c.checkpoint).committed()[:1] for c in (old, new))
    if not before or (now and now[0][0] >= before[0][0]):
        return ""
    return (
        f"run_dir {new.run_dir} has its newest checkpoint at {before[0][1]}, where checkpoint.store = "
        f"{new.checkpoint.store!r} does not look; set it back to {old.checkpoint.store!r}, or copy the "
        "checkpoints to the new place first"
    )


def _difference(place: str, old: TrainConfig, job: Job, beside: Sequence[str] = ()) -> str:
    """Why the config of what is at `place` forbids this job; "" if it may go on. beside: sections that may
    differ, too.
    """
    new = job.config
    changeable = (*CHANGEABLE, *beside)
    pinned = [{k: v for k, v in configs.to_dict(c).items() if k not in changeable} for c in (old, new)]
    for values in pinned:
        values.get("data", {}).pop("decoder", None)  # check_continuation compares the one in use
    keys = list(configs.differing_keys(pinned[0], pinned[1]))
    if keys:
        changes = ", ".join(f"{key} was {_value(old, key)!r}, now {_value(new, key)!r}" for key in keys)
        return (
            f"{place} holds another experiment: {changes}; set them back to resume it, or choose another "
            f"run_dir{' and checkpoint.store' * bool(new.checkpoint.store)}"
        )
    before, now = old.num_steps(job.mixture.steps_per_epoch), job.total_steps
    if before > now:
        return f"{place} was started for {before:,} steps and cannot be shortened to {now:,}"
    return ""


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config
