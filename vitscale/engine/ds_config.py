"""The [engine] section, and the DeepSpeed JSON that follows from it."""

import dataclasses
from typing import Any, Literal

import torch

from vitscale.config import check_choices, positive
from vitscale.engine.batches import BatchPlan
from vitscale.engine.setup import RANK_MULTIPLE
from vitscale.errors import ConfigError
from vitscale.models.layers import Checkpointing
from vitscale.models.model import CommonConfig
from vitscale.models.vit_config import ViTConfig

Precision = Literal["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Speed and memory ([engine]); the results stay the same up to rounding.

    micro_batch: images per device and forward pass; 0 = all of a rank's share, undivided.
    zero_stage: what DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 parameters too.
    reduce_precision: in which gradients are sent and summed over ranks: "fp32", or the run's
        own, which sends half as much, and whose error grows with the number of ranks.
    activation_checkpointing: what the backward pass recomputes of each block: "none",
        "selective" (norms and GELU; matmuls and attention are kept) or "full".
    compile: compile each block with torch.compile, for training; evaluations run eagerly. A
        ViT's width and mlp_dim must be multiples of 8, or in fp32 of 4.
    tf32: compute fp32 matmuls and convolutions on GPUs in TF32, of 10 bits of mantissa.
    num_workers: data worker processes per rank; 0 = decode in the training process.
    cache_dir: a folder on the node's own disk, shared by its processes, that keeps what was
        read from remote shards; "" = none.
    cache_gb: the most that cache_dir keeps, in 10^9 bytes.
    offload_optimizer: keep master weights, moments and the update on the CPU.
    offload_folder: a folder on the node's own disk (NVMe) that keeps the moments, in place of
        memory; with offload_optimizer; "" = none.
    deepspeed_extra: keys for DeepSpeed's JSON; those that vitscale derives are refused.
    """

    micro_batch: int = 0
    zero_stage: int = 1
    reduce_precision: Precision = "fp32"
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    tf32: bool = False
    num_workers: int = 2
    cache_dir: str = ""
    cache_gb: float = 100.0
    offload_optimizer: bool = False
    offload_folder: str = ""
    deepspeed_extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.zero_stage == 0:
            raise ConfigError(
                "engine.zero_stage 0 is refused: DeepSpeed's stage 0 is wrong in bf16 and its state cannot "
                "be resharded; use 1, which is the same on one device"
            )
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"engine.zero_stage {self.zero_stage} is not one of 1, 2, 3")
        if self.micro_batch < 0 or self.num_workers < 0:
            raise ConfigError("engine.micro_batch and engine.num_workers must not be negative")
        positive("engine", cache_gb=self.cache_gb)
        if self.offload_folder and not self.offload_optimizer:
            raise ConfigError(
                f'engine.offload_folder = "{self.offload_folder}" needs engine.offload_optimizer = true: '
                "only an optimizer on the CPU can keep its moments on a disk"
            )
        zero = self.deepspeed_extra.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ConfigError(
                f"engine.deepspeed_extra.zero_optimization must be a table, not {zero!r}; remove it, and set "
                "engine.zero_stage for the stage"
            )
        if zero.get("round_robin_gradients"):
            raise ConfigError(
                "engine.deepspeed_extra.zero_optimization.round_robin_gradients is refused: with it "
                "DeepSpeed mislabels which rank holds which parameter; leave it out"
            )


def make_ds_config(
    config: EngineConfig, plan: BatchPlan, precision: Precision, clip_norm: float
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the section and the batch plan, never written by hand.

    Raises ConfigError for what does not work together. Configs of earlier runs may hold it.
    """
    if config.compile and config.zero_stage == 3:
        raise ConfigError(
            "engine.compile = true is refused with engine.zero_stage = 3: the hooks that gather the "
            "parameters make torch.compile give up on each block in silence; use stage 1 or 2, or "
            "compile = false"
        )
    for key in ("prescale_gradients", "gradient_predivide_factor"):
        if key in config.deepspeed_extra:
            raise ConfigError(
                f"engine.deepspeed_extra.{key} is refused: vitscale divides sums of gradients after it "
                "has them; leave it out"
            )
    zero = config.deepspeed_extra.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise ConfigError(
                f'engine.deepspeed_extra.zero_optimization.{key}.device = "nvme" is refused: a checkpoint '
                "would not find what DeepSpeed moves there; set engine.offload_optimizer = true and "
                "engine.offload_folder"
            )
    size = zero.get("allgather_bucket_size", RANK_MULTIPLE)
    if config.zero_stage < 3 and isinstance(size, int | float) and (size <= 0 or size % RANK_MULTIPLE):
        raise ConfigError(
            f"engine.deepspeed_extra.zero_optimization.allgather_bucket_size = {size} must be a "
            f"multiple of {RANK_MULTIPLE}, so that what NCCL sends is aligned; round it, or leave it out"
        )
    derived: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": clip_norm,
        "communication_data_type": config.reduce_precision,
        "steps_per_print": 10**9,  # never: the loop logs for itself
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice in a micro step
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list
        "zero_optimization": {
            "stage": config.zero_stage,
            # True would replace F.linear in the whole process, and change the numerics.
            "memory_efficient_linear": False,
        },
    }
    if config.zero_stage < 3:
        # True would divide by the number of ranks in the run's precision, and then sum. Where
        # DeepSpeed reduces, all gradients are sent to all ranks either way; with its
        # BF16_Optimizer gradients.py reduces, and each goes to its owner alone.
        derived["zero_optimization"]["reduce_scatter"] = False
    if config.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
        derived["zero_force_ds_cpu_optimizer"] = False  # keep torch's optimizer, for the same results
    if precision != "fp32":
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "bf16":
        # Each gradient is added to its sum in fp32, and freed, within the backward pass.
        derived["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if precision == "fp16":
        derived["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return _with_extra(derived, config.deepspeed_extra, "engine.deepspeed_extra")


def check_compiled(config: EngineConfig, model: CommonConfig, precision: Precision) -> None:
    """Raise ConfigError for a model whose compiled blocks would read wrong addresses on a GPU.

    Blocks share a graph, in which torch.compile takes each parameter to be as aligned to 16
    bytes as the first block's. DeepSpeed keeps them in one buffer without gaps. The sizes of
    all parameters of a block follow from these two; those of a ResNet are multiples of 32.
    """
    if not config.compile or not isinstance(model, ViTConfig):
        return
    multiple = 4 if precision == "fp32" else 8
    for key, size in (("width", model.resolved_width), ("mlp_dim", model.resolved_mlp_dim)):
        if size % multiple:
            raise ConfigError(
                f"engine.compile = true is refused with model.{key} = {size}: on a GPU, compiled blocks in "
                f"{precision} read 16 bytes at a time; use a multiple of {multiple}, or compile = false"
            )


def has_bf16_optimizer(zero_stage: int, precision: str, *, offload: bool) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which reduces after the backward pass.

    gradients.py makes each rank sum only the gradients that it updates with. ZeRO 1 in other
    precisions, or with offload, shares the optimizer of ZeRO 2.
    """
    return zero_stage == 1 and precision == "bf16" and not offload


def check_ds_config(values: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed refuses its JSON, for which deepspeed_extra is the reason.

    DeepSpeed itself checks it, in some seconds for its import.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        # Without train_batch_size, which it would compare with the processes that run here.
        DeepSpeedConfig({key: value for key, value in values.items() if key != "train_batch_size"})
    except ValidationError as error:
        first = error.errors()[0]
        key, reason = ".".join(map(str, first["loc"])), f"{first['msg']} ({error.title})"
    except (ValueError, TypeError, AssertionError) as error:
        key, reason = "", str(error).partition("\n")[0]
    else:
        return
    raise ConfigError(
        f"engine.deepspeed_extra holds what DeepSpeed refuses{key and f', {key}'}: {reason}; fix or remove it"
    ) from None


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
