"""What a config would run, in words and numbers, without building anything on a device."""

import json
from collections.abc import Callable, Sequence

import torch

from vitscale import config as configs
from vitscale import memory
from vitscale.checkpoint import load, room
from vitscale.checkpoint.store import Home
from vitscale.checkpoint.verify import Checkpoint, open_together
from vitscale.data.data_config import SourceConfig
from vitscale.data.sources import Source, missing_sources, open_sources
from vitscale.data.split import split_classes
from vitscale.engine import zero
from vitscale.engine.engine import DTYPES
from vitscale.errors import UserError
from vitscale.job import Job, check_shards_and_classes, derive, expected_first_loss, open_tasks
from vitscale.models import Model, empty_model
from vitscale.models.flops import train_flops
from vitscale.objectives.distillation import DistillationConfig
from vitscale.optim.optimizers import freeze
from vitscale.redaction import redact
from vitscale.run_dir.continuation import check_continuation, check_new_length, check_teacher
from vitscale.run_dir.directory import check_place, check_run_dir
from vitscale.system.cores import num_cores
from vitscale.teacher import Teacher, load_teacher, place_of
from vitscale.train_config import TrainConfig
from vitscale.weights.saved import SavedModel


def describe(config: TrainConfig, world_size: int) -> str:
    """Config, data, batch plan, model, memory estimate and DeepSpeed JSON, as text.

    Raises what train() would raise before its first step. Only an index may be missing, if the
    config states data.num_samples. What else is missing then is listed, too.
    """
    missing = missing_sources(config.data)
    job = derive(config, world_size, open_sources(config.data, missing))
    model = empty_model(config.model)
    num_params = sum(param.numel() for param in model.parameters())
    freeze(model, config.optim.freeze)
    teacher = None
    if missing:
        notes = _missing_lines(job, model, missing)
    else:
        check_shards_and_classes(job)
        open_tasks(job)
        teacher = _open_teacher(config)
        _check_start(job, model, teacher)
        notes = []
    text = "\n\n".join(
        (
            f"# resolved config\n{configs.to_toml(config).strip()}",
            *([_section("not there yet", notes)] if notes else []),
            _section("data", _data_lines(job)),
            _section("batch plan", _batch_lines(job)),
            _section("model and optimizer", _model_lines(config, num_params)),
            _section("memory per device (estimate)", _memory_lines(job, teacher)),
            f"# DeepSpeed JSON\n{json.dumps(job.deepspeed_config, indent=2)}",
        )
    )
    return redact(text)


def _open_teacher(config: TrainConfig) -> Teacher | None:
    """The teacher of a distillation on the CPU; None where timm would have to fetch it."""
    section = config.objective
    if not isinstance(section, DistillationConfig) or (section.is_timms and not section.teacher_weights):
        return None
    place = place_of(section)
    return load_teacher(section, place, config.model, torch.device("cpu"), DTYPES[config.precision])


def _check_start(job: Job, model: Model, teacher: Teacher | None) -> None:
    """Check what train() would start from: the run's own checkpoint, or that of [init]."""
    config = job.config
    home = Home.of(config.run_dir, config.checkpoint)
    check_place(job)
    check_run_dir(job)
    if not home.store:
        room.check_space(home, config.checkpoint, memory.checkpoint_bytes(config.model, config.optim))
    checkpoint = load.find(home)
    if checkpoint:
        check_continuation(job, checkpoint)
        if teacher:
            check_teacher(checkpoint, teacher.digest, teacher.weights)
        _check_state(checkpoint, config, model)
    else:
        _check_init(job, model)


def _check_init(job: Job, model: Model) -> None:
    config = job.config
    if config.init.full_state:
        checkpoint = open_together(config.init.checkpoint)
        check_new_length(checkpoint.folder, checkpoint.manifest.step, job.total_steps)
        _check_state(checkpoint, config, model)
    elif config.init.checkpoint:
        saved = SavedModel(config.init.checkpoint, slot="ema" if config.init.ema else "fp32")
        saved.names_for(config.model, head=config.init.head)


def _check_state(checkpoint: Checkpoint, config: TrainConfig, model: Model) -> None:
    shapes = zero.shapes(model)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    load.check_fits(checkpoint, shapes, shapes.keys() - trained, config.optim.name)


def _missing_lines(job: Job, model: Model, missing: Sequence[SourceConfig]) -> list[tuple[str, str]]:
    """What a plan without its data could not check, with the reason."""
    lines = [
        (
            "index",
            f"{source.index} is missing; planned for {source.num_samples:,} samples, as the config says",
        )
        for source in missing
    ]
    checks: list[tuple[str, Callable[[], object]]] = [
        ("evaluations", lambda: open_tasks(job)),
        ("teacher", lambda: _open_teacher(job.config)),
        ("init", lambda: _check_init(job, model)),
    ]
    for name, check in checks:
        try:
            check()
        except UserError as error:
            lines.append((name, str(error)))
    return lines


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    return "\n".join([f"# {title}", *(f"{name:<24}{value}" for name, value in lines)])


def _data_lines(job: Job) -> list[tuple[str, str]]:
    mixture = job.mixture
    world_sizes = [world for world in mixture.worlds() if job.config.global_batch % world == 0]
    lines: list[tuple[str, str]] = []
    parts = zip(job.sources, mixture.orders, mixture.weights, mixture.epochs(job.total_steps), strict=True)
    for source, order, weight, epochs in parts:
        index = source.index
        size = (
            f"{len(index.shards):,} shards; {index.num_bytes:,} bytes" if index.num_bytes else "no index yet"
        )
        lines += [
            ("source", f"{source.name}: {float(weight):.2%} of every batch, {epochs:,.2f} epochs"),
            ("  samples", f"{index.num_samples:,} in {size}"),
            *_class_lines(source, job.config),
            ("  left out", f"{order.tail:,} each epoch (different ones); {len(source.excluded):,} excluded"),
            ("  damaged", f"{index.num_damaged:,} known to the index"),
        ]
    return [
        *lines,
        ("steps per epoch", f"{mixture.steps_per_epoch:,}"),
        ("total steps", f"{job.total_steps:,}"),
        ("lanes", f"{mixture.lanes:,}; it runs on {', '.join(map(str, world_sizes))} devices"),
        ("JPEG decoder", job.decoder),
    ]


def _class_lines(source: Source, config: TrainConfig) -> list[tuple[str, str]]:
    """How many classes a source has, and what a validation split makes of them."""
    index, fraction = source.index, config.data.validation_fraction
    num_classes, num_held_out = len(index.label_counts), len(source.held_out)
    about = "" if num_classes else "about "
    lines: list[tuple[str, str]] = []
    if config.data.fraction < 1:
        part = f"{about}{source.layout.num_drawn:,} samples, by data.fraction {config.data.fraction:g}"
        lines.append(("  trained on", part))
    if not num_classes:
        return [*lines, ("  validate", f"about {num_held_out:,} samples")] if fraction else lines
    lines.append(("  classes", f"{num_classes:,}; model.num_classes is {config.model.num_classes:,}"))
    if fraction:
        lacking = split_classes(index, fraction)
        validating, training = (num_classes - len(labels) for labels in lacking)
        lines += [
            ("  train", f"{source.layout.num_drawn:,} samples of {training:,} classes"),
            ("  validate", f"{num_held_out:,} samples of {validating:,} classes"),
        ]
    return lines


def _batch_lines(job: Job) -> list[tuple[str, str]]:
    plan = job.plan
    return [
        ("global batch", f"{plan.global_batch:,}"),
        ("world size", f"{plan.world_size:,}"),
        ("micro batch", f"{plan.micro_batch:,}"),
        ("accumulation steps", f"{plan.grad_accum_steps:,}"),
    ]


def _model_lines(config: TrainConfig, num_params: int) -> list[tuple[str, str]]:
    decay = config.optim.lr * config.optim.weight_decay
    first_loss = expected_first_loss(config)
    return [
        ("parameters", f"{num_params:,}"),
        ("training FLOPs", f"{train_flops(config.model):,} per image"),
        ("effective weight decay", f"{decay:g} per step at the peak rate, on kernels only"),
        ("expected first loss", "depends on the pixels" if first_loss is None else f"{first_loss:.6f}"),
    ]


def _memory_lines(job: Job, teacher: Teacher | None) -> list[tuple[str, str]]:
    config, engine = job.config, job.config.engine
    need = memory.estimate(
        config.model,
        engine,
        job.plan.micro_batch,
        job.plan.world_size,
        config.precision,
        average=config.optim.ema_decay > 0,
        optimizer=config.optim.name,
    )
    return [
        ("parameters and state", f"{need.state / 2**30:,.2f} GiB"),
        ("activations", f"{need.activations / 2**30:,.2f} GiB"),
        ("buffers", f"{need.buffers / 2**30:,.2f} GiB"),
        *([("teacher", f"{teacher.num_bytes / 2**30:,.2f} GiB of weights")] if teacher else []),
        ("host", f"{engine.num_workers} data workers per rank on {num_cores()} cores"),
    ]
