"""The DeepSpeed engine: how a global batch is cut, the JSON derived for it, and how it starts.

Beside checkpoint/state.py this is the only module that knows DeepSpeed. What stands in [engine] is speed and
memory only: it leaves the results equal up to rounding.
"""

import dataclasses
import logging
from typing import Any, Literal

import torch
from torch import nn

from vitscale import distributed
from vitscale.config import ConfigError, positive

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Dense bf16 FLOP/s without sparsity, from the vendors' data sheets; MFU is reported for these only.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Speed and memory ([engine]).

    micro_batch: images per device and forward pass; 0 = global_batch / world_size, without accumulation.
    num_workers: data worker processes per rank; 0 = decode in the training process. cache_dir: a folder on
    the node's own disk that keeps up to cache_gb (10^9 bytes) of what was read from remote shards, for all
    processes of the node; "" = nowhere. offload_optimizer: masters, moments and the update on the CPU.
    deepspeed_extra: keys passed through to DeepSpeed's JSON; one that vitscale derives is refused.
    """

    micro_batch: int = 0
    zero_stage: int = 1
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False
    num_workers: int = 2
    cache_dir: str = ""
    cache_gb: float = 100.0
    offload_optimizer: bool = False
    deepspeed_extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero_stage == 0:
            raise ConfigError(
                "engine.zero_stage 0 is refused: DeepSpeed's stage 0 is wrong in bf16 and its state cannot "
                "be resharded; use 1, which on one device is the same thing"
            )
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"engine.zero_stage {self.zero_stage} is not one of 1, 2, 3")
        if self.micro_batch < 0 or self.num_workers < 0:
            raise ConfigError("engine.micro_batch and engine.num_workers must not be negative")
        positive("engine", cache_gb=self.cache_gb)
        zero = self.deepspeed_extra.get("zero_optimization", {})
        if zero.get("round_robin_gradients"):
            raise ConfigError(
                "engine.deepspeed_extra.zero_optimization.round_robin_gradients is refused: with it "
                "DeepSpeed mislabels which rank holds which parameter; leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """global_batch = world_size x micro_batch x grad_accum_steps."""

    global_batch: int
    world_size: int
    micro_batch: int
    grad_accum_steps: int

    @property
    def per_rank(self) -> int:
        return self.micro_batch * self.grad_accum_steps


def plan_batches(global_batch: int, micro_batch: int, world_size: int) -> BatchPlan:
    """Cut a global batch among ranks and micro steps. Raises ConfigError with what would fit where it does
    not divide.
    """
    if global_batch % world_size:
        fitting = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of world_size {world_size}; start one of "
            f"{_listed(fitting)} processes, or use global_batch = "
            f"{max(1, global_batch // world_size) * world_size}"
        )
    per_rank = global_batch // world_size
    micro = micro_batch or per_rank
    if per_rank % micro:
        near = min((m for m in range(1, per_rank + 1) if per_rank % m == 0), key=lambda m: abs(m - micro))
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of engine.micro_batch {micro} x world_size "
            f"{world_size} = {micro * world_size}; use engine.micro_batch = {near}"
        )
    return BatchPlan(
        global_batch=global_batch,
        world_size=world_size,
        micro_batch=micro,
        grad_accum_steps=per_rank // micro,
    )


def deepspeed_config(
    config: EngineConfig, plan: BatchPlan, precision: Precision, clip_norm: float
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the engine section and the batch plan; never written by hand."""
    derived: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": clip_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list
        "zero_optimization": {
            "stage": config.zero_stage,
            # Otherwise a stage 3 engine replaces F.linear for the whole process, and with it the numerics.
            "memory_efficient_linear": False,
        },
    }
    if config.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
        derived["zero_force_ds_cpu_optimizer"] = False  # ours is torch's, so that results stay the same
    if precision == "bf16":
        derived |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if precision == "fp16":
        derived |= {"fp16": {"enabled": True, "initial_scale_power": 16}}
    return _with_extra(derived, config.deepspeed_extra, "engine.deepspeed_extra")


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    plan: BatchPlan,
    ds_config: dict[str, Any],
) -> Any:
    """Hand the model and its optimizer to DeepSpeed; every rank calls it. Returns the DeepSpeedEngine."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if distributed.device().type == "cpu":
        # DeepSpeed's shared-memory kernel serves inference only, yet it is compiled at start (30 s, needs a
        # compiler) and leaves 66 MB per rank in /dev/shm for ever. Training on CPU goes through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    model.set_activation_checkpointing(config.activation_checkpointing)  # type: ignore[operator]
    if config.compile:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()  # in place, so that parameter names stay
    accelerator = get_accelerator()
    if ds_config.get("fp16") and accelerator and not accelerator.is_fp16_supported():
        raise ConfigError('precision "fp16" does not run on this device; use "bf16" or "fp32"')
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    assert engine.gradient_accumulation_steps() == plan.grad_accum_steps
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the rate of every parameter group for the coming step."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr


def grad_norm(engine: Any) -> float:
    """Global gradient norm of the last step before clipping; NaN if DeepSpeed did not compute it."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def peak_flops() -> float:
    """bf16 peak of this device in FLOP/s, or 0 where it is not known (any CPU)."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), 0.0)


def _with_extra(derived: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _with_extra(merged[key], value, f"{where}.{key}")
        elif key in merged:
            raise ConfigError(f"{where}.{key} is derived by vitscale (here {merged[key]!r}); remove it")
        else:
            merged[key] = value
    return merged


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:8], "...", numbers[-1]]))
