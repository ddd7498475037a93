"""What a run needs of a device's memory, by arithmetic, before anything is built."""

import dataclasses
import functools
import math
from typing import Any

from vitscale.engine.batches import BatchPlan
from vitscale.engine.ds_config import EngineConfig, has_bf16_optimizer
from vitscale.engine.fragments import OPTIMIZER_SLOTS
from vitscale.image_size import sides
from vitscale.models import Model, ModelConfig, empty_model
from vitscale.models.hybrid import HybridConfig
from vitscale.models.layers import Checkpointing
from vitscale.models.resnet import ROOT_KERNEL, ResNetConfig, halved
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.adafactor import second_size
from vitscale.optim.optimizers import OptimConfig, block_kernels, freeze

# Defaults of DeepSpeed's runtime/zero/config.py, in elements: gradients that are reduced at a
# time, and how soon stage 3 must need a parameter again to leave it gathered.
REDUCE_BUCKET, MAX_REUSE_DISTANCE = 500_000_000, 1_000_000_000
# A guess: CUDA's context, NCCL's buffers and the kernels take so much, and fragmentation so
# large a share of what is allocated.
CONTEXT_BYTES, FRAGMENTED = 2_000_000_000, 0.05


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a device needs for training, by what needs them.

    overhead: what the device and the allocator take beside what is allocated.
    """

    state: int
    activations: int
    buffers: int
    overhead: int

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would report."""
        return self.state + self.activations + self.buffers

    @property
    def total(self) -> int:
        return self.allocated + self.overhead


def estimate(
    model: ModelConfig,
    engine: EngineConfig,
    micro_batch: int,
    world_size: int,
    precision: str,
    *,
    average: bool = False,
    optimizer: str = "adamw",
) -> Memory:
    """What a device needs to train.

    average: whether one of the weights is kept (ema_decay). optimizer: optim.name.
    """
    num_params = count_params(model)
    stage = engine.zero_stage
    needed = optimizer_bytes(model, optimizer)
    state = state_bytes(num_params, stage, world_size, precision, engine.offload_optimizer, needed)
    state += 4 * num_params // world_size if average else 0  # each rank averages what it owns
    activations = activation_bytes(model, micro_batch, precision, engine.activation_checkpointing)
    activations += head_bytes(model, micro_batch)
    buffers = buffer_bytes(
        num_params, stage, precision, engine.reduce_precision, offload=engine.offload_optimizer
    )
    overhead = CONTEXT_BYTES + int(FRAGMENTED * (state + activations + buffers))
    return Memory(state, activations, buffers, overhead)


@functools.cache
def count_params(model: ModelConfig) -> int:
    return sum(param.numel() for param in empty_model(model).parameters())


@dataclasses.dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer needs on average.

    per_param: bytes for each parameter, which ZeRO cuts. whole: bytes that every rank has.
    """

    per_param: float = 12.0
    whole: int = 0


ADAMW = OptimizerBytes()


@functools.cache
def optimizer_bytes(model: ModelConfig, name: str) -> OptimizerBytes:
    """Of fp32 masters and the moments of the optimizer `name`, if all of the model is trained.

    AdamW        4 + 4 + 4 bytes a parameter
    SGD          4 + 4
    Adafactor    4 + 2; the second moments of rows and columns are on every rank
    Muon         4 + 4 of the kernels of the blocks, 4 + 4 + 4 of the others
    """
    moments, whole = _moment_bytes(empty_model(model), name)
    return OptimizerBytes(4.0 + moments / count_params(model), whole)


def _moment_bytes(model: Model, optimizer: str) -> tuple[int, int]:
    """Bytes of the moments of what is trained: those that ZeRO cuts, and those it does not."""
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    per_param = sum(dtype.itemsize for dtype in OPTIMIZER_SLOTS[optimizer].values())
    moments, whole = per_param * sum(param.numel() for param in trained.values()), 0
    if optimizer == "adafactor":
        whole = 4 * sum(second_size(name, tuple(param.shape)) for name, param in trained.items())
    if optimizer == "muon":
        moments -= 4 * sum(trained[kernel].numel() for kernel in block_kernels(model) & trained.keys())
    return moments, whole


def state_bytes(
    num_params: int,
    zero_stage: int,
    world_size: int,
    precision: str,
    offload: bool = False,
    optimizer: OptimizerBytes = ADAMW,
) -> int:
    """Bytes per device of parameters, gradients and the optimizer's state.

    From a stage on, ZeRO cuts them by the world size (arXiv 1910.02054, section 3):

        bytes per parameter    fp32    16 bit    cut from stage
        parameters                4         2    3
        gradients                 4         4    2    (their sum; 16-bit ones are freed at once)
        optimizer                12        12    1    (AdamW: fp32 master, two moments)

    With offload the optimizer's part is in the memory of the host.
    """
    param, grad = (4, 4) if precision == "fp32" else (2, 4)
    whole, sharded = {1: (param + grad, 0), 2: (param, grad), 3: (0, param + grad)}[zero_stage]
    needed = OptimizerBytes(0.0) if offload else optimizer
    cut = num_params * sharded + round(num_params * needed.per_param)
    return num_params * whole + cut // world_size + needed.whole


def activation_bytes(
    config: ModelConfig, micro_batch: int, precision: str, checkpointing: Checkpointing
) -> int:
    """Bytes of activations that the backward pass of one micro batch needs.

    What is recomputed needs the memory of "none" for one block at a time.
    """
    match config:
        case HybridConfig():
            # The stem's backward pass begins when that of the blocks has ended.
            kept, at_once = _stem_activations(config, micro_batch, precision, checkpointing)
            return kept + max(at_once, vit_activation_bytes(config, micro_batch, precision, checkpointing))
        case ViTConfig():
            return vit_activation_bytes(config, micro_batch, precision, checkpointing)
        case ResNetConfig():
            return _resnet_activations(config, micro_batch, precision, checkpointing)


def vit_activation_bytes(
    config: ViTConfig, micro_batch: int, precision: str, checkpointing: Checkpointing
) -> int:
    """Per token of a block of width D and MLP width M, in 16 bit; fp32 takes twice as much:

        "none"         two norms, qkv, attention output: 16 D; both activations of the MLP: 4 M
        "selective"    input, qkv, attention output, projections: 12 D; first MLP layer: 2 M
        "full"         input: 2 D

    Attention matrices are never stored, but of relative positions "none" keeps the logits that
    they add: N^2 for each head. With dropout, "none" also keeps masks of a byte an element:
    2 D + M.
    """
    tokens, width, mlp = config.num_tokens, config.resolved_width, config.resolved_mlp_dim
    size = 2 if precision == "fp32" else 1
    masks = tokens * (2 * width + mlp) if config.dropout else 0
    biases = 2 * size * config.resolved_num_heads * tokens**2 if config.posemb == "relative" else 0
    whole = size * tokens * (16 * width + 4 * mlp) + masks + biases
    kept = {
        "none": whole,
        "selective": size * tokens * (12 * width + 2 * mlp),
        "full": size * tokens * 2 * width,
    }
    at_once = 0 if checkpointing == "none" else whole
    return micro_batch * (config.resolved_depth * kept[checkpointing] + at_once)


def _stem_activations(
    config: HybridConfig, micro_batch: int, precision: str, checkpointing: Checkpointing
) -> tuple[int, int]:
    """Bytes that stay until the stem's backward pass, and of the block that it recomputes.

    As in _resnet_activations, but norms come after the convolutions:

        "none"         input, outputs of the convolutions, and two ReLUs: s^2 (I + 2 M)
                       + t^2 (2 M + O), and t^2 O more with a projection
        "selective"    input, and outputs of the first two convolutions: s^2 (I + M) + t^2 M
        "full"         input: s^2 I

    Where a stride pads, the padded copy stays, too. Beside the blocks: padded images, the
    root's output, its ReLU, and where its largest values are (8 bytes each), the last map, and
    its patches. Each convolution keeps two copies of its kernel in fp32, and in 16 bit a third.
    """
    size = 4 if precision == "fp32" else 2
    kept = largest = kernels = largest_kernels = 0
    for shape in config.block_shapes:
        s2, t2 = math.prod(shape.grid_in), math.prod(shape.grid_out)
        none = s2 * (shape.inputs + 2 * shape.mid) + t2 * (2 * shape.mid + shape.outputs)
        none += t2 * shape.outputs if shape.has_projection else 0
        none += math.prod(side + 1 for side in shape.grid_in) * shape.mid if shape.stride > 1 else 0
        selective = s2 * (shape.inputs + shape.mid) + t2 * shape.mid
        kept += {"none": none, "selective": selective, "full": s2 * shape.inputs}[checkpointing]
        kernels += shape.num_weights
        largest, largest_kernels = max(largest, none), max(largest_kernels, shape.num_weights)
    width, root_input = config.resolved_stem_width, sides(config.image_size)
    ends = 3 * math.prod(side + 5 for side in root_input)
    ends += 2 * math.prod(halved(root_input)) * width
    last = math.prod(config.grid) * config.patch_inputs
    ends += 2 * last if config.block_shapes else last  # no gradient needs the largest values
    indices = 8 * math.prod(halved(halved(root_input))) * width
    kernels += ROOT_KERNEL**2 * 3 * width
    copies = 8 if precision == "fp32" else 10
    stays = micro_batch * (size * (kept + ends) + indices)
    if checkpointing == "none":
        return stays + copies * kernels, 0
    return stays, size * micro_batch * largest + copies * largest_kernels


def _resnet_activations(
    config: ResNetConfig, micro_batch: int, precision: str, checkpointing: Checkpointing
) -> int:
    """For maps of s^2 places into and t^2 out of a block of I, M and O channels, in values:

        "none"         input and its norm's ReLU: 2 s^2 I; the same of the two other norms:
                       2 s^2 M + 2 t^2 M
        "selective"    input, and outputs of the first two convolutions: s^2 (I + M) + t^2 M
        "full"         input: s^2 I

    Beside the blocks, the root's padded output and where its largest values are, and the last
    map and its ReLU. Each convolution also keeps its standardised kernel: "none" all of them.
    """
    size = 4 if precision == "fp32" else 2
    kept = largest = kernels = largest_kernels = 0
    for shape in config.block_shapes:
        s2, t2 = math.prod(shape.grid_in), math.prod(shape.grid_out)
        none = 2 * s2 * (shape.inputs + shape.mid) + 2 * t2 * shape.mid
        kept += {"none": none, "selective": none // 2, "full": s2 * shape.inputs}[checkpointing]
        kernels += shape.num_weights
        largest, largest_kernels = max(largest, none), max(largest_kernels, shape.num_weights)
    ends = 2 * math.prod(halved(sides(config.image_size))) * config.resolved_width
    ends += 2 * math.prod(config.grid) * config.num_features
    if checkpointing == "none":
        return size * (micro_batch * (kept + ends) + kernels)
    return size * (micro_batch * (kept + largest + ends) + largest_kernels)


def head_bytes(config: ModelConfig, micro_batch: int) -> int:
    """Bytes of the heads in fp32: logits, targets, the loss's own copy and their gradient, and
    a copy of the weights with its gradient.

    A patch head counts as if all patches were corrupted.
    """
    match config:
        case ViTConfig():
            inputs, num_heads = config.representation_size or config.resolved_width, 1 + config.distilled
            of_patches = config.num_patch_outputs * (
                16 * micro_batch * math.prod(config.grid) + 8 * config.resolved_width
            )
        case ResNetConfig():
            inputs, num_heads, of_patches = config.num_features, 1, 0
    return num_heads * config.num_classes * (16 * micro_batch + 8 * inputs) + of_patches


def buffer_bytes(
    num_params: int, zero_stage: int, precision: str, reduce_precision: str, *, offload: bool = False
) -> int:
    """Bytes of DeepSpeed's own buffers beside the activations.

        gradients to be reduced    a bucket: in fp32 at stage 1, in the run's precision at stage
                                   2, in that of the reduction at stage 3
        their copy                 for the reduction, if it is in another precision, and always
                                   at stage 3
        gathered parameters        at stage 3, those that it leaves gathered

    In bf16 at stage 1 without offload, gradients are reduced after the backward pass, when the
    activations are gone: in place in fp32, else by way of a copy. So it is elsewhere with a
    bucket that is never full, and its copy.

    Sources: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py, stage3.py and config.py.
    """
    if has_bf16_optimizer(zero_stage, precision, offload=offload):
        return 0
    size, reduced = (4 if each == "fp32" else 2 for each in (precision, reduce_precision))
    bucket = {1: 4, 2: size, 3: reduced}[zero_stage]
    copied = REDUCE_BUCKET if num_params > REDUCE_BUCKET and (reduced != bucket or zero_stage == 3) else 0
    gathered = min(num_params, MAX_REUSE_DISTANCE // 2) if zero_stage == 3 else 0
    return bucket * REDUCE_BUCKET + reduced * copied + size * gathered


def micro_batches(per_rank: int, *, pairs: bool) -> list[int]:
    """The micro batches, rising, that a rank's images of a step can be cut into.

    pairs: they must be even, for mixup.
    """
    step = 2 if pairs else 1
    return [micro_batch for micro_batch in range(step, per_rank + 1, step) if per_rank % micro_batch == 0]


def explain_too_small(
    model: ModelConfig,
    engine: EngineConfig,
    plan: BatchPlan,
    precision: str,
    device_bytes: int,
    optimizer: str = "adamw",
    *,
    pairs: bool,
    starting: bool,
) -> str:
    """What to say where a device runs out of memory: what needs it, and what fits by plan.

    device_bytes: what this process can have of the device. optimizer: optim.name. pairs: micro
    batches must be even. starting: while the model was made, and not yet trained.

    Fragmentation and kernels take more than is planned, so a micro batch that ran out is never
    advised, even if it fits by plan.
    """
    offload, needed = engine.offload_optimizer, optimizer_bytes(model, optimizer)
    states = state_bytes(count_params(model), engine.zero_stage, plan.world_size, precision, offload, needed)
    available = f"{device_bytes / 2**30:,.2f} GiB"
    others = more_room(model, engine, plan.world_size, precision, optimizer, activations=not starting)
    if starting:
        return (
            "CUDA is out of memory at the start, while the model is made: by plan parameters and state take "
            f"{states / 2**30:,.2f} GiB of {available}; use {others}"
        )

    def activations(micro_batch: int) -> int:
        return activation_bytes(model, micro_batch, precision, engine.activation_checkpointing)

    parts = {"parameters and state": states, "activations": activations(plan.micro_batch)}
    texts = [f"{name} {size / 2**30:,.2f} GiB" for name, size in sorted(parts.items(), key=lambda p: -p[1])]
    fitting = [
        micro_batch
        for micro_batch in micro_batches(plan.per_rank, pairs=pairs)
        if micro_batch < plan.micro_batch and states + activations(micro_batch) <= device_bytes
    ]
    way_out = (
        f"set engine.micro_batch = {fitting[-1]}, the largest below it that fits by plan"
        if fitting
        else f"no smaller one fits by plan: use {others}"
    )
    return (
        f"CUDA is out of memory with engine.micro_batch {plan.micro_batch}: by plan it needs {texts[0]} (the "
        f"largest part) and {texts[1]} of {available}; {way_out}"
    )


def more_room(
    model: ModelConfig,
    engine: EngineConfig,
    world_size: int,
    precision: str,
    optimizer: str,
    *,
    activations: bool,
) -> str:
    """What needs less memory by estimate. activations: whether they may be what ran out."""

    def needed(**changes: Any) -> int:
        changed = dataclasses.replace(engine, **changes)
        return estimate(model, changed, 1, world_size, precision, optimizer=optimizer).total

    refused = " with engine.compile = false" if engine.compile else ""
    now, has_stages = needed(), optimizer != "muon"  # which runs at ZeRO 1 and 2, without offload
    others = {
        # ZeRO 3 and offload take buffers that outweigh what they save of a small state.
        f"engine.zero_stage = 3{refused}": has_stages and needed(zero_stage=3) < now,
        'engine.activation_checkpointing = "full"': activations and engine.activation_checkpointing != "full",
        "engine.offload_optimizer = true": has_stages and needed(offload_optimizer=True) < now,
        "more devices": True,
    }
    return " or ".join(name for name in others if others[name])


def checkpoint_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """Bytes of a checkpoint: fp32 weights and, of what is trained, the other slots."""
    model = empty_model(config)
    freeze(model, optim.freeze)
    num_bytes = 4 * sum(param.numel() for param in model.parameters())
    if optim.ema_decay:
        num_bytes += 4 * sum(param.numel() for param in model.parameters() if param.requires_grad)
    return num_bytes + sum(_moment_bytes(model, optim.name))
