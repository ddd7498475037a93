"""A plan: what every ZeRO stage and policy needs on a cluster, and the one to choose."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

from vitscale import memory
from vitscale.checkpoint.verify import at_a_glance, open_directory
from vitscale.data.mixture import lanes_of
from vitscale.data.sources import make_mixture, open_sources
from vitscale.engine.batches import BatchPlan, plan_batches
from vitscale.errors import ConfigError, UserError
from vitscale.job import check_pairs, has_pairs
from vitscale.memory import Memory
from vitscale.models.flops import train_flops
from vitscale.models.layers import Checkpointing
from vitscale.plan import formulas
from vitscale.plan.speed import DECODE_RATE, Speed
from vitscale.run_dir.continuation import check_new_length
from vitscale.system.hardware import GPUS, Gpu, gpu_name
from vitscale.train_config import TrainConfig

STAGES = (1, 2, 3)
# Among options that are as fast as the fastest, as far as estimates can tell, the simplest is
# chosen: the lowest stage, then the least recomputation.
NEARLY = 0.9
# ZeRO 3 cuts what the other stages keep whole, which fits into 80 GB up to about so many
# parameters. Below, how fast it is counts only where the others do not fit.
FITS_WHOLE = 2_000_000_000
# Of the numbers of a cluster: what follows from them is finite.
SMALLEST, LARGEST = 1e-9, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned on; each field is an option of tools/plan.py. 0 = not known.

    gpus: of all nodes together.
    gpu: a name of hardware.GPUS, as in "h100".
    gpu_memory_gb: of each, where it is another than that of the data sheet.
    nic_gbit: Gbit/s of the network card of each GPU.
    cores_per_node: that may decode images.
    decode_rate: images/s of a core; 0 = as measured, or a guess.
    image_kb: mean size of a stored image.
    failures_per_node_day: of each node in a day.
    restart_minutes: from a failure to the next step.
    store_gb_per_s: what all nodes together write to the checkpoint store, in 10^9 bytes/s.
    price: of a GPU for an hour, in any currency.
    """

    gpus: int
    gpu: str = "h100"
    gpu_memory_gb: float = 0.0
    gpus_per_node: int = 8
    nic_gbit: float = 400.0
    cores_per_node: int = 0
    decode_rate: float = 0.0
    image_kb: float = 110.0
    failures_per_node_day: float = 0.0065
    restart_minutes: float = 10.0
    store_gb_per_s: float = 2.0
    price: float = 0.0

    def __post_init__(self) -> None:
        gpu_name(self.gpu)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "gpu" and value != field.default and not SMALLEST <= value <= LARGEST:
                option = f"--{field.name.replace('_', '-')}"
                raise ConfigError(f"{option} {value} must be from {SMALLEST:g} to {LARGEST:g}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            near = round(self.gpus / self.gpus_per_node) * self.gpus_per_node
            raise ConfigError(
                f"--gpus {self.gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}; use {near}"
            )

    @property
    def kind(self) -> Gpu:
        return GPUS[gpu_name(self.gpu)]

    @property
    def memory_bytes(self) -> int:
        return int(1e9 * (self.gpu_memory_gb or self.kind.memory_gb))

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A ZeRO stage and a policy, at the largest micro batch that fits.

    compiled: whether blocks are; not at stage 3. micro_batch: 0 if none fits. memory: of that
    micro batch, or else of the smallest. The times are of an optimizer step: exposed_seconds is
    what communication adds to it, train_seconds all that the GPUs take, and data_seconds what
    the loader takes beside it, 0 where its cores are not known.
    """

    zero_stage: int
    checkpointing: Checkpointing
    compiled: bool
    micro_batch: int
    accumulation: int
    memory: Memory
    compute_seconds: float
    exposed_seconds: float
    update_seconds: float
    train_seconds: float
    data_seconds: float
    images_per_second: float
    mfu: float

    @property
    def step_seconds(self) -> float:
        return max(self.train_seconds, self.data_seconds)

    @property
    def waiting_seconds(self) -> float:
        """Of a step: for stragglers and for data."""
        busy = self.compute_seconds + self.exposed_seconds + self.update_seconds
        return max(0.0, self.step_seconds - busy)

    @property
    def loader_bound(self) -> bool:
        return self.data_seconds > self.train_seconds

    @property
    def fits(self) -> bool:
        return self.micro_batch > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints, and what they and failures cost.

    interval_seconds, interval_steps: the best, up to the length of the run. lost_share:
    relative to training time.
    """

    num_bytes: int
    write_seconds: float
    blocking_seconds: float
    between_failures_seconds: float
    interval_seconds: float
    interval_steps: int
    lost_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """options: those that do not fit are among them. best: None if none fits, and so the rest.

    first_step: how many of total_steps another run has done, which [init] continues with
    full_state. None if that cannot be read: then all of them are planned.
    decode_rate: images/s of a core. loader_cores: of each node, so that the GPUs do not wait.
    """

    config: TrainConfig
    cluster: Cluster
    speed: Speed
    num_params: int
    total_steps: int
    first_step: int | None
    per_gpu: int
    options: tuple[Option, ...]
    best: Option | None
    decode_rate: float
    loader_cores: int = 0
    storage_gb_per_s: float = 0.0
    saving: Saving | None = None
    days: float = 0.0
    cost: float = 0.0

    @property
    def steps_left(self) -> int:
        return self.total_steps - (self.first_step or 0)

    @property
    def num_images(self) -> int:
        return self.steps_left * self.config.global_batch


def make_plan(config: TrainConfig, cluster: Cluster, speed: Speed) -> Plan:
    """The plan of a config, without its data. Raises ConfigError for what cannot be trained."""
    if config.precision == "fp32":
        raise ConfigError('precision "fp32" has no estimate of speed; plan with precision=bf16')
    batches, speed = _check_batch(config, cluster), speed.of_kind(config.model.kind)
    decode_rate = cluster.decode_rate or speed.decode_rate or DECODE_RATE
    planner = _Planner(config, cluster, speed, batches, decode_rate)
    stages = [stage for stage in STAGES if stage < 3 or config.optim.name != "muon"]  # which is refused
    options = tuple(planner.option(stage, policy) for stage in stages for policy in get_args(Checkpointing))
    num_params, total_steps = memory.count_params(config.model), num_steps(config)
    plan = Plan(
        config=config,
        cluster=cluster,
        speed=speed,
        num_params=num_params,
        total_steps=total_steps,
        first_step=_first_step(config, total_steps),
        per_gpu=batches.per_rank,
        options=options,
        best=choose(options, num_params),
        decode_rate=decode_rate,
    )
    return _with_rest(plan, plan.best) if plan.best else plan


def num_steps(config: TrainConfig) -> int:
    """The optimizer steps of a run whose data are not read. Raises ConfigError if unknown."""
    if not config.total_epochs:
        return config.num_steps(1)  # the steps of an epoch do not count
    sections = config.data.all_sources()
    if not all(section.num_samples for section in sections):
        raise ConfigError(
            f"total_epochs = {config.total_epochs:g} needs the number of samples, and the data are not read: "
            "set data.num_samples (python tools/data.py stats counts them), or total_steps or total_samples"
        )
    sources = open_sources(config.data, sections)
    repeats, batch = config.augment.repeats, config.global_batch
    mixture = make_mixture(sources, config.data, seed=config.seed, global_batch=batch, repeats=repeats)
    return config.num_steps(mixture.steps_per_epoch)


def _first_step(config: TrainConfig, total_steps: int) -> int | None:
    """As in Plan. Raises ConfigError if no step is left."""
    place = config.init.checkpoint
    if not config.init.full_state:
        return 0
    try:
        checkpoint = open_directory(place, at_a_glance)
    except (UserError, OSError):
        return None
    check_new_length(checkpoint.folder, checkpoint.manifest.step, total_steps)
    return checkpoint.manifest.step


def choose(options: Sequence[Option], num_params: int) -> Option | None:
    """The first of the options that fit and are nearly as fast as the fastest of them.

    Up to FITS_WHOLE parameters, those of ZeRO 3 count only if no others fit.
    """
    fitting = [option for option in options if option.fits]
    if num_params < FITS_WHOLE:
        fitting = [option for option in fitting if option.zero_stage < 3] or fitting
    fastest = max((option.images_per_second for option in fitting), default=0.0)
    return next((option for option in fitting if option.images_per_second >= NEARLY * fastest), None)


def _check_batch(config: TrainConfig, cluster: Cluster) -> BatchPlan:
    """How GPUs share a batch, undivided. Raises ConfigError where training would refuse it."""
    gpus, repeats = cluster.gpus, config.augment.repeats
    batches = plan_batches(config.global_batch, 0, gpus)
    lanes, drawn = lanes_of(config.global_batch, config.data.lanes, repeats), config.global_batch // repeats
    if lanes % gpus:
        more = f"set data.lanes to a multiple of it that divides the {drawn:,} samples that a step draws"
        way_out = f"use a divisor of {lanes:,}" if drawn % gpus else f"{more}, like {gpus}"
        raise ConfigError(f"--gpus {gpus} does not divide the {lanes:,} lanes of the data; {way_out}")
    check_pairs(config, batches.micro_batch, drawn // lanes)
    return batches


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Works out options. decode_rate: images/s of a core."""

    config: TrainConfig
    cluster: Cluster
    speed: Speed
    batches: BatchPlan
    decode_rate: float

    def option(self, stage: int, policy: Checkpointing) -> Option:
        config, cluster, per_gpu = self.config, self.cluster, self.batches.per_rank
        compiled = config.engine.compile and stage < 3  # together they are refused
        sizes = memory.micro_batches(per_gpu, pairs=has_pairs(config))
        needs = {size: self._memory(stage, policy, size) for size in sizes}
        micro_batch = max((size for size in sizes if needs[size].total <= cluster.memory_bytes), default=0)
        accumulation = per_gpu // (micro_batch or sizes[0])
        flops, gpu = train_flops(config.model), cluster.kind
        efficiency = self.speed.efficiency(config.model, gpu, compiled=compiled)
        work = self.speed.work(policy, compiled=compiled) * formulas.STAGE_WORK[stage]
        compute = formulas.compute_seconds(per_gpu, flops, efficiency, gpu.flops, work)
        exposed = self._exposed_seconds(stage, accumulation, compute)
        num_params = memory.count_params(config.model)
        if config.engine.offload_optimizer:
            update = formulas.offloaded_update_seconds(num_params, cluster.gpus)
        else:
            update = formulas.update_seconds(num_params, cluster.gpus, gpu.memory_tb_per_s)
        train = formulas.step_seconds(compute, exposed, update, cluster.nodes)
        decoded = cluster.cores_per_node * cluster.nodes * self.decode_rate
        data = config.global_batch / decoded if decoded else 0.0
        speed = config.global_batch / max(train, data)
        return Option(
            zero_stage=stage,
            checkpointing=policy,
            compiled=compiled,
            micro_batch=micro_batch,
            accumulation=accumulation,
            memory=needs[micro_batch or sizes[0]],
            compute_seconds=compute,
            exposed_seconds=exposed,
            update_seconds=update,
            train_seconds=train,
            data_seconds=data,
            images_per_second=speed,
            mfu=formulas.model_flops_utilization(speed, flops, cluster.gpus, gpu.flops),
        )

    def _memory(self, stage: int, policy: Checkpointing, micro_batch: int) -> Memory:
        config = self.config
        engine = dataclasses.replace(config.engine, zero_stage=stage, activation_checkpointing=policy)
        average, world_size = config.optim.ema_decay > 0, self.cluster.gpus
        return memory.estimate(
            config.model,
            engine,
            micro_batch,
            world_size,
            config.precision,
            average=average,
            optimizer=config.optim.name,
        )

    def _exposed_seconds(self, stage: int, accumulation: int, compute_seconds: float) -> float:
        config, cluster = self.config, self.cluster
        num_params, offload = memory.count_params(config.model), config.engine.offload_optimizer
        elements = formulas.communication(num_params, stage, accumulation, config.precision, offload=offload)
        gradient_bytes = 4 if config.engine.reduce_precision == "fp32" else 2
        link, nic = cluster.kind.link_gb_per_s, cluster.nic_gbit
        bus = formulas.bus_gb_per_s(cluster.gpus, cluster.gpus_per_node, link, nic)
        seconds = formulas.communication_seconds(elements, gradient_bytes, cluster.gpus, bus)
        return formulas.exposed_seconds(seconds, compute_seconds, overlapped=stage == 3)


def _with_rest(plan: Plan, best: Option) -> Plan:
    """The plan with what follows from the chosen option: data, checkpoints, days and cost."""
    config, cluster, speed = plan.config, plan.cluster, best.images_per_second
    saving = _saving(config, cluster, best.step_seconds, plan.steps_left)
    days = formulas.training_days(plan.num_images, speed, saving.lost_share)
    return dataclasses.replace(
        plan,
        loader_cores=formulas.loader_cores(
            config.global_batch / best.train_seconds, cluster.nodes, plan.decode_rate
        ),
        storage_gb_per_s=formulas.storage_gb_per_s(speed / config.augment.repeats, cluster.image_kb),
        saving=saving,
        days=days,
        cost=formulas.cost(days, cluster.gpus, cluster.price),
    )


def _saving(config: TrainConfig, cluster: Cluster, step_seconds: float, steps_left: int) -> Saving:
    num_bytes = memory.checkpoint_bytes(config.model, config.optim)
    write = num_bytes / (cluster.store_gb_per_s * 1e9)
    blocking = formulas.save_blocking_seconds(num_bytes, cluster.gpus)
    between = formulas.seconds_between_failures(cluster.nodes, cluster.failures_per_node_day)
    # A save begins when the one before it has been written.
    interval = max(formulas.checkpoint_interval_seconds(blocking, between), blocking + write)
    interval = min(interval, steps_left * step_seconds)
    return Saving(
        num_bytes=num_bytes,
        write_seconds=write,
        blocking_seconds=blocking,
        between_failures_seconds=between,
        interval_seconds=interval,
        interval_steps=max(1, round(interval / step_seconds)),
        lost_share=formulas.lost_share(interval, blocking, between, 60 * cluster.restart_minutes),
    )
