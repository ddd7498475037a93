"""How a run starts: from the first of these that it has.

1  its own newest good checkpoint: the run is resumed
2  another run's full state ([init] with full_state)
3  another checkpoint's weights ([init]), with a new head and resized position embeddings
4  nothing: from scratch
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Generator, Iterator
from pathlib import Path

from torch import Tensor

from vitscale import distributed, memory
from vitscale.checkpoint import load, room
from vitscale.checkpoint.save import Saver
from vitscale.checkpoint.store import Home
from vitscale.checkpoint.verify import Checkpoint, open_together
from vitscale.data.cache import NodeCache
from vitscale.data.loader import Batch, batches, on_device
from vitscale.data.quarantine import FILE_NAME as QUARANTINE_NAME
from vitscale.data.quarantine import Quarantine
from vitscale.engine.engine import DTYPES, Engine
from vitscale.errors import ConfigError
from vitscale.guard.spikes import FILE_NAME as SPIKES_NAME
from vitscale.guard.spikes import Spikes
from vitscale.job import Job, Tasks, has_pairs
from vitscale.metrics.pace import Pace
from vitscale.metrics.rows import trim_metrics
from vitscale.metrics.writer import MetricsWriter, SilentWriter
from vitscale.models import empty_model
from vitscale.objectives import build_objective
from vitscale.objectives.distillation import DistillationConfig
from vitscale.objectives.objective import Objective
from vitscale.optim.optimizers import freeze
from vitscale.progress import Progress
from vitscale.quantities import counted
from vitscale.rng import derive_seed
from vitscale.run_dir.continuation import check_continuation, check_new_length, check_teacher
from vitscale.run_dir.directory import write_record
from vitscale.system import hardware
from vitscale.teacher import Teacher, load_teacher, place_of
from vitscale.train_config import TrainConfig
from vitscale.weights.saved import SavedModel, Slot, locate

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop works with."""

    job: Job
    tasks: Tasks
    engine: Engine
    objective: Objective
    teacher: Teacher | None
    progress: Progress
    batches: Iterator[Batch]
    quarantine: Quarantine
    spikes: Spikes
    saver: Saver
    metrics: MetricsWriter
    pace: Pace


@contextlib.contextmanager
def started(job: Job, tasks: Tasks, rolled_back: Progress | None = None) -> Iterator[Run]:
    """A run that is ready for its next step, closed at the end; every rank enters it.

    rolled_back: where it was before it was rolled back; None = it was not.
    """
    config = job.config
    home = Home.of(config.run_dir, config.checkpoint)
    with distributed.alike():
        save_bytes = memory.checkpoint_bytes(config.model, config.optim)
    room.check(home, config.checkpoint, save_bytes)
    with enough_memory(job, starting=True):
        teacher = open_teacher(config)
        engine, progress, passed_over = start(job, home, teacher)
    if rolled_back:
        progress.pass_over(rolled_back)
    with (
        contextlib.closing(engine),
        open_metrics(job, progress) as metrics,
        contextlib.closing(open_stream(job, progress)) as stream,
        Saver(home, config.checkpoint, passed_over, metrics.best_of) as saver,
    ):
        yield Run(
            job=job,
            tasks=tasks,
            engine=engine,
            objective=build_objective(
                config.objective,
                loss=config.loss,
                augment=config.augment,
                model=config.model,
                teacher=teacher,
            ),
            teacher=teacher,
            progress=progress,
            batches=stream,
            quarantine=Quarantine(
                config.run_dir,
                config.data.max_bad_fraction,
                bad_samples=progress.bad_samples,
                samples_seen=progress.samples_seen,
            ),
            spikes=Spikes(config.run_dir, job.sources, job.mixture.first_ids, config.guard.spike_deviations),
            saver=saver,
            metrics=metrics,
            pace=Pace(),
        )


def open_teacher(config: TrainConfig) -> Teacher | None:
    """The teacher of a distillation; every rank calls it, and has the whole model."""
    objective = config.objective
    if not isinstance(objective, DistillationConfig):
        return None
    place = place_of(objective)
    device, dtype = distributed.device(), DTYPES[config.precision]
    teacher = distributed.together(lambda: load_teacher(objective, place, config.model, device, dtype))
    if distributed.is_main():
        logger.info("the teacher is %s, of digest %s", place, teacher.digest)
    return teacher


def start(job: Job, home: Home, teacher: Teacher | None = None) -> tuple[Engine, Progress, tuple[str, ...]]:
    """Start the engine in the order of the module's list; every rank calls it.

    Returns the engine, where the run is, and its checkpoints that did not verify.
    """
    config = job.config
    own = checkpoint = load.find(home)
    passed_over = own.passed_over if own else ()
    if checkpoint:
        with distributed.alike():
            check_continuation(job, checkpoint)
            if teacher:
                check_teacher(checkpoint, teacher.digest, teacher.weights)
        distributed.on_main(lambda: write_record(job))
    elif config.init.full_state:
        checkpoint = open_together(config.init.checkpoint)
        with distributed.alike():
            check_new_length(checkpoint.folder, checkpoint.manifest.step, job.total_steps)
    initial = () if checkpoint else initial_values(config)
    model = empty_model(config.model)
    with distributed.alike():
        freeze(model, config.optim.freeze)
    engine = Engine(model, config.optim, config.engine, job.plan, config.precision)
    if not checkpoint:
        engine.fill(initial)
        return engine, Progress(), passed_over
    load.resume(engine, checkpoint)
    manifest = checkpoint.manifest
    if distributed.is_main():
        ranks, stage = manifest.world_size, manifest.zero_stage
        writers = counted(ranks, "rank")
        logger.info("resumed from %s, written by %s at ZeRO %d", checkpoint.folder, writers, stage)
    counts = {name: getattr(manifest.train, name) for name in vars(Progress())}
    progress = Progress(**counts)
    if not own:
        progress.rollbacks = 0  # each run has its own guard.rollbacks
    return engine, progress, passed_over


def initial_values(config: TrainConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights of a new run, one whole tensor at a time; every rank calls it.

    They follow from the seed. If there is an [init], its backbone follows, and replaces them.
    """
    from_seed = empty_model(config.model).initial_values(derive_seed(config.seed, "init"))
    if not config.init.checkpoint:
        return from_seed
    slot: Slot = "ema" if config.init.ema else "fp32"
    place = locate(config.init.checkpoint)
    saved, names = distributed.together(lambda: _open_init(place, slot, config))
    if distributed.is_main():
        logger.info("initialising %d tensors from %s (step %d)", len(names), saved.path, saved.step)
    return itertools.chain(from_seed, saved.taken_over(config.model, head=config.init.head))


def _open_init(place: str | Checkpoint, slot: Slot, config: TrainConfig) -> tuple[SavedModel, list[str]]:
    """The model of [init], and the names of the tensors that are taken over from it."""
    saved = SavedModel(place, slot=slot)
    return saved, saved.names_for(config.model, head=config.init.head)


def open_metrics(job: Job, progress: Progress) -> MetricsWriter:
    """On rank 0 a writer, without the rows past `progress`; on other ranks a silent one."""
    config = job.config
    if not distributed.is_main():
        return SilentWriter()
    for name in (QUARANTINE_NAME, SPIKES_NAME):  # not by step: a roll-back repeats steps with other data
        trim_metrics(Path(config.run_dir) / name, progress.data_step, "data_step")
    return MetricsWriter(
        config.run_dir,
        resume_step=progress.step,
        total_steps=job.total_steps,
        tensorboard=config.log.tensorboard,
        expect=config.expect,
        judge=config.checkpoint.keep_best,
    )


def open_stream(job: Job, progress: Progress) -> Generator[Batch, None, None]:
    """This rank's part of every batch from where the run is to its end."""
    config = job.config
    cache = NodeCache(config.engine.cache_dir, int(config.engine.cache_gb * 1e9))
    lanes = job.mixture.rank_lanes(distributed.rank(), job.plan.world_size)
    steps = range(progress.data_step, progress.data_step + job.total_steps - progress.step)
    stream = job.stream(lanes, steps, cache if config.engine.cache_dir else None)
    return on_device(batches(stream, config.engine.num_workers), distributed.device())


@contextlib.contextmanager
def enough_memory(job: Job, *, starting: bool = False) -> Iterator[None]:
    """Raises ConfigError where this rank's GPU is too small for the block."""
    try:
        yield
    except RuntimeError as error:
        if not hardware.lacks_memory(error):
            raise
        own = distributed.device_bytes()
        config = job.config
        message = memory.explain_too_small(
            config.model,
            config.engine,
            job.plan,
            config.precision,
            own,
            config.optim.name,
            pairs=has_pairs(config),
            starting=starting,
        )
        raise ConfigError(message) from None
