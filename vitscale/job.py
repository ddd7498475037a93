"""A Job: what follows from a config, its data and the world size, before anything runs."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitscale import distributed
from vitscale.data.cache import NodeCache
from vitscale.data.classes import difference
from vitscale.data.decode import Decoder, resolve_decoder
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream
from vitscale.data.mixture import Mixture
from vitscale.data.sources import (
    Source,
    check_labels,
    check_sources,
    make_mixture,
    open_sources,
    warn_of_classes,
)
from vitscale.engine.batches import BatchPlan, plan_batches
from vitscale.engine.ds_config import check_compiled, check_ds_config, make_ds_config
from vitscale.errors import ConfigError
from vitscale.evals import open_task
from vitscale.evals.classify import ClassifyTask
from vitscale.evals.task import Task
from vitscale.objectives.distillation import DistillationConfig
from vitscale.objectives.masked_patches import COLORS, MaskedPatchesConfig
from vitscale.train_config import TrainConfig

logger = logging.getLogger(__name__)
Tasks = Mapping[str, Task]


@dataclasses.dataclass(frozen=True)
class Job:
    """What follows from a config, its data and the world size. Nothing in it is on a device."""

    config: TrainConfig
    sources: tuple[Source, ...]
    mixture: Mixture
    decoder: Decoder
    plan: BatchPlan
    total_steps: int
    deepspeed_config: dict[str, Any]

    def stream(self, lanes: range, steps: range, cache: NodeCache | None = None) -> Stream:
        """The stream of some lanes. steps: global batches of the data, counted from 0."""
        model = self.config.model
        return Stream(
            sources=self.sources,
            mixture=self.mixture,
            view_config=ViewConfig(self.config.augment, self.decoder, model.image_size, model.num_classes),
            lanes=lanes,
            first_step=steps.start,
            last_step=steps.stop,
            cache=cache,
        )

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """A digest of what every step reads: the samples, their order and their labels."""
        # Every save asks for it, and hashing millions of excluded samples takes half a second.
        return self.fingerprint_with([""] * len(self.sources))

    def fingerprint_with(self, index_fingerprints: Sequence[str]) -> str:
        """As data_fingerprint, for other indexes of the sources; "" = a source's own."""
        pairs = zip(self.sources, index_fingerprints, strict=True)
        return self.mixture.fingerprint([source.fingerprint(index) for source, index in pairs])


def prepare(config: TrainConfig, world_size: int) -> Job:
    """Derive the job, and refuse what does not fit together, before any expensive work.

    Every rank calls it. Rank 0 alone looks for the shards: thousands of ranks would ask a
    shared store millions of times. Raises ConfigError, DataError or StoreError on every rank.
    """
    job = distributed.together(lambda: derive(config, world_size, open_sources(config.data)))
    distributed.on_main(lambda: check_shards_and_classes(job))
    return job


def check_shards_and_classes(job: Job) -> None:
    """Raise DataError as check_sources does, and warn as warn_of_classes where labels count."""
    check_sources(job.sources)
    if not isinstance(job.config.objective, MaskedPatchesConfig):
        warn_of_classes(job.sources, job.config.data)


def derive(config: TrainConfig, world_size: int, sources: tuple[Source, ...]) -> Job:
    """The job of a config and of its opened sources. Raises ConfigError."""
    if not isinstance(config.objective, MaskedPatchesConfig):
        check_labels(sources, config.data, config.model.num_classes)
    mixture = _mixture_of(config, sources)
    mixture.rank_lanes(0, world_size)
    plan = plan_batches(config.global_batch, config.engine.micro_batch, world_size)
    check_pairs(config, plan.micro_batch, mixture.draws_per_step)
    check_compiled(config.engine, config.model, config.precision)
    deepspeed_config = make_ds_config(config.engine, plan, config.precision, config.optim.clip_norm)
    if config.engine.deepspeed_extra:
        check_ds_config(deepspeed_config)
    return Job(
        config=config,
        sources=sources,
        mixture=mixture,
        decoder=resolve_decoder(config.data.decoder),
        plan=plan,
        total_steps=config.num_steps(mixture.steps_per_epoch),
        deepspeed_config=deepspeed_config,
    )


def open_tasks(job: Job) -> Tasks:
    """The evaluations of a job, with their data open; raises what open_task raises."""
    config, tasks = job.config, dict[str, Task]()
    for name, section in config.evals.items():
        num_workers = section.resolved_num_workers(config.engine.num_workers)
        section = dataclasses.replace(section, num_workers=num_workers)
        tasks[name] = task = open_task(name, section, config.model.image_size, job.sources[0], config.loss)
        if isinstance(task, ClassifyTask) and task.config.test and distributed.is_main():
            _warn_of_test_labels(job, name, task)
    return tasks


def _warn_of_test_labels(job: Job, name: str, task: ClassifyTask) -> None:
    """Warn, in one line, where the test shards of evals.NAME seem to have other labels."""
    section, sections = task.config, job.config.data.all_sources()
    if len(sections) == 1 and sections[0].label_map and not section.label_map:
        logger.warning(
            'evals.%s has no label_map, and the data have one: the labels of %s are not mapped; if they are '
            'those of %s, set evals.%s.label_map = "%s"',
            name, section.test, sections[0].index, name, sections[0].label_map,
        )  # fmt: skip
        return
    theirs = task.test.classes, section.test
    pairs = zip(job.sources, sections, strict=True)
    known = ((source.classes, part.index) for source, part in pairs if source.index.label_counts)
    if words := next(filter(None, (difference(*ours, *theirs) for ours in known)), ""):
        logger.warning(
            "%s: the test labels of evals.%s are not those of training; map them by evals.%s.label_map, or "
            "pack both together",
            words, name, name,
        )  # fmt: skip


def worlds(config: TrainConfig, sources: tuple[Source, ...]) -> list[int]:
    """The numbers of processes that can share the work of a config."""
    mixture = _mixture_of(config, sources)

    def can_share(world_size: int) -> bool:
        try:
            plan = plan_batches(config.global_batch, config.engine.micro_batch, world_size)
            check_pairs(config, plan.micro_batch, mixture.draws_per_step)
        except ConfigError:
            return False
        return True

    return [world_size for world_size in mixture.worlds() if can_share(world_size)]


def _mixture_of(config: TrainConfig, sources: tuple[Source, ...]) -> Mixture:
    return make_mixture(
        sources,
        config.data,
        seed=config.seed,
        global_batch=config.global_batch,
        repeats=config.augment.repeats,
    )


def check_pairs(config: TrainConfig, micro_batch: int, draws_per_step: int) -> None:
    """Raise ConfigError unless mixup and cutmix get pairs: neighbours in one micro batch.

    draws_per_step: of each lane.
    """
    if not has_pairs(config):
        return
    if micro_batch % 2:
        raise ConfigError(
            f"augment.mixup and augment.cutmix pair neighbours, so the micro batch of {micro_batch} must be "
            "even; change engine.micro_batch, global_batch or the number of processes"
        )
    repeats = config.augment.repeats
    if repeats > 1 and draws_per_step % 2:
        way_out = "data.lanes = 0, or half as many"
        if config.global_batch // repeats % 2:  # of an odd number, no lane has an even part
            way_out = f"global_batch = {max(1, config.global_batch // (2 * repeats)) * 2 * repeats}"
        raise ConfigError(
            f"with augment.repeats = {repeats}, mixup and cutmix need an even number of samples of each lane "
            f"in a step, not {draws_per_step}; use {way_out}"
        )


def has_pairs(config: TrainConfig) -> bool:
    """Whether neighbours in a micro batch are mixed with each other."""
    return bool(config.augment.mixup or config.augment.cutmix)


def expected_first_loss(config: TrainConfig) -> float | None:
    """The loss of a zero-initialised head, with one positive label per image.

    softmax: ln C. sigmoid with bias b: C softplus(b) - b. Colours of patches: the logarithm of
    their number. A teacher's class is one more label. None: it depends on the pixels.
    """
    if isinstance(config.objective, MaskedPatchesConfig):
        return None if config.objective.target == "regression" else math.log(COLORS)
    if isinstance(config.objective, DistillationConfig) and config.objective.target == "soft":
        return None
    if config.loss.name == "softmax":
        return math.log(config.model.num_classes)
    bias = config.model.head_bias
    return config.model.num_classes * math.log1p(math.exp(bias)) - bias
