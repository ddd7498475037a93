"""What a config would run, in words and numbers, without building anything on a device."""

import json
import os

from vitscale import config as configs
from vitscale import memory
from vitscale.job import Job, expected_first_loss, prepare
from vitscale.models import empty_model
from vitscale.models.flops import train_flops
from vitscale.train_config import TrainConfig


def describe(config: TrainConfig, world_size: int) -> str:
    """Config, data, batch plan, model, memory estimate and DeepSpeed JSON, as text.

    Raises what train() would raise for a config or a data set that cannot be used.
    """
    job = prepare(config, world_size)
    num_params = sum(param.numel() for param in empty_model(config.model).parameters())
    return "\n\n".join(
        (
            f"# resolved config\n{configs.to_toml(config).strip()}",
            _section("data", _data_lines(job)),
            _section("batch plan", _batch_lines(job)),
            _section("model and optimizer", _model_lines(config, num_params)),
            _section("memory per device (estimate)", _memory_lines(job, num_params)),
            f"# DeepSpeed JSON\n{json.dumps(job.deepspeed_config, indent=2)}",
        )
    )


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    return "\n".join([f"# {title}", *(f"{name:<24}{value}" for name, value in lines)])


def _data_lines(job: Job) -> list[tuple[str, str]]:
    mixture = job.mixture
    world_sizes = [world for world in mixture.worlds() if job.config.global_batch % world == 0]
    lines: list[tuple[str, str]] = []
    parts = zip(job.sources, mixture.orders, mixture.weights, mixture.epochs(job.total_steps), strict=True)
    for source, order, weight, epochs in parts:
        index = source.index
        size = f"{len(index.shards):,} shards; {index.num_bytes:,} bytes"
        lines += [
            ("source", f"{source.name}: {float(weight):.2%} of every batch, {epochs:,.2f} epochs"),
            ("  samples", f"{index.num_samples:,} in {size}"),
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
    return [
        ("parameters", f"{num_params:,}"),
        ("training FLOPs", f"{train_flops(config.model):,} per image"),
        ("effective weight decay", f"{decay:g} per step at the peak rate, on kernels only"),
        ("expected first loss", f"{expected_first_loss(config):.6f}"),
    ]


def _memory_lines(job: Job, num_params: int) -> list[tuple[str, str]]:
    config, engine = job.config, job.config.engine
    states = memory.state_bytes(num_params, engine.zero_stage, job.plan.world_size, config.precision)
    activations = memory.activation_bytes(
        config.model, job.plan.micro_batch, config.precision, engine.activation_checkpointing
    )
    return [
        ("parameters and state", f"{states / 2**30:,.2f} GiB"),
        ("activations", f"{activations / 2**30:,.2f} GiB"),
        ("host", f"{engine.num_workers} data workers per rank on {os.cpu_count()} cores"),
    ]
