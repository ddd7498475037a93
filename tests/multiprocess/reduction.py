"""Steps in 16 bits on several ranks: how exact the mean gradient is, and what is sent."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from multiprocess.fresh import Fresh
from multiprocess.ranks import HasFp16
from multiprocess.zygote import Zygote
from torch import Tensor
from torch.nn.functional import cross_entropy

from vitscale import distributed
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig, Precision
from vitscale.engine.engine import DTYPES, Engine
from vitscale.models import Model, build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import OptimConfig

MODEL = ViTConfig(variant="Ti/4", width=48, depth=2, num_heads=3, mlp_dim=96, image_size=8, num_classes=10)
NUM_PARAMS = 41_146
# The first step of SGD at a rate of 1 subtracts the gradient.
OPTIM = OptimConfig(name="sgd", lr=1.0, clip_norm=0.0)
MICRO_BATCH = 4
LOSS_SCALE = 2.0**16  # with which fp16 begins; it changes no bit of what bf16 rounds
# By default, ZeRO 3 does not cut what is as small as the parameters here, and leaves all that
# it gathers.
CUT = {"stage3_param_persistence_threshold": 0}
ENGINES: dict[str, dict[str, Any]] = {
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3, "deepspeed_extra": {"zero_optimization": CUT}},
}
# How often what a collective is given crosses a GPU's link, times (n - 1) / n.
CROSSINGS = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


class Measured(NamedTuple):
    """What is known of an engine.

    error: of the gradient of its first step, relative to the norm of the exact mean.
    sent: elements that its second step sends, by precision, as in formulas.Communication, and
        as "held" those of the gradients that the parameters still have after a backward pass;
        "misaligned" counts what it sends and receives, on all ranks, from elsewhere than
        multiples of 16 bytes.
    norms: of the first gradient, as each rank has it.
    """

    error: float
    sent: dict[str, int]
    norms: list[float]


def measured(
    ranks: Zygote | Fresh,
    folder: Path,
    precision: str,
    world_size: int,
    accumulation: int,
    engines: dict[str, dict[str, Any]],
    way: Callable[..., None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Measured]:
    """What ranks measure of engines, by name. way: measure, unless given."""
    log = folder / "log"
    arguments = folder, precision, accumulation, engines
    statuses = ranks.run(world_size, way or measure, *arguments, log=log, environment=environment)
    assert statuses == [0] * world_size, log.read_text()
    return {name: Measured(*json.loads((folder / f"{name}.json").read_text())) for name in engines}


def measure_over_gloo(*arguments: Any) -> None:
    """As measure, for ranks that share one GPU, which NCCL refuses.

    CUDA_VISIBLE_DEVICES must name that GPU alone, and LOCAL_RANK be 0 on every rank.
    """
    torch.distributed.init_process_group("cuda:gloo,cpu:gloo")
    measure(*arguments)


def measure(
    folder: Path, precision: Precision, accumulation: int, engines: Mapping[str, dict[str, Any]]
) -> None:
    """Steps of every engine, by name; NAME.json gets what Measured has."""
    HasFp16().arm()
    distributed.initialize()
    deterministic()
    sent = count_collectives()
    world_size = distributed.world_size()
    plan = plan_batches(world_size * accumulation * MICRO_BATCH, MICRO_BATCH, world_size)
    exact = mean_gradient(precision, world_size, accumulation)
    for name, options in engines.items():
        engine = Engine(made(), OPTIM, EngineConfig(**options), plan, precision)
        before = {param: master.clone() for param, master in engine.owned()["fp32"].items()}
        step(engine, accumulation)
        after, squares = engine.owned()["fp32"], [0.0, 0.0]
        for fragment in engine.fragments():
            moved = before[fragment.name] - after[fragment.name]
            expected = exact[fragment.name].flatten()[fragment.start : fragment.start + fragment.count]
            squares[0] += (moved.double() - expected).square().sum().item()
            squares[1] += expected.square().sum().item()
        error, whole = distributed.all_reduce_sum(squares)
        norms = distributed.gather_floats(engine.grad_norm().item())
        sent.clear()
        sent["held"] = step(engine, accumulation)
        sent["misaligned"] = round(distributed.all_reduce_sum([float(sent["misaligned"])])[0])
        if distributed.is_main():
            (folder / f"{name}.json").write_text(json.dumps([(error / whole) ** 0.5, sent, norms]))
        engine.close()


def deterministic() -> None:
    """Let attention and matmuls add in one order, also on a GPU, or raise.

    There, CUBLAS_WORKSPACE_CONFIG must be set.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's buckets are of 2 GB


def made() -> Model:
    model = build_model(MODEL, 1)
    with torch.no_grad():
        # A head of zeros would hide what is behind it. With a larger one, gradients in fp16 are
        # up to 45,000: another CPU's random numbers made some overflow.
        model.head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    return model


def micro_batch(rank: int, micro_step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + micro_step)
    images = torch.randn(MICRO_BATCH, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (MICRO_BATCH,), generator=generator)
    return images.to(distributed.device()), labels.to(distributed.device())


def mean_gradient(precision: Precision, world_size: int, accumulation: int) -> dict[str, Tensor]:
    """Of the gradients that plain PyTorch has for each micro batch, summed in fp64."""
    dtype = DTYPES[precision]
    total: dict[str, Tensor] = {}
    for rank in range(world_size):
        for micro_step in range(accumulation):
            model = made().to(distributed.device(), dtype)
            images, labels = micro_batch(rank, micro_step)
            loss = cross_entropy(model(images.to(dtype)).float(), labels)
            (LOSS_SCALE / accumulation * loss).backward()
            for name, param in model.named_parameters():
                assert param.grad is not None
                total[name] = total.get(name, 0) + param.grad.double() / LOSS_SCALE / world_size
    return total


def step(engine: Engine, accumulation: int) -> int:
    """One step. Returns the most elements of gradients that the parameters kept in it."""
    held = 0
    for micro_step in range(accumulation):
        images, labels = micro_batch(distributed.rank(), micro_step)
        engine.backward(cross_entropy(engine.forward(images).float(), labels))
        grads = [param.grad for param in engine.module.parameters()]
        held = max(held, sum(grad.numel() for grad in grads if grad is not None))
        engine.step()
    return held


def count_collectives() -> Counter[str]:
    """Elements that this process sends from now on, by precision, and as "misaligned" tensors.

    DeepSpeed, which keeps some of these functions, must not have been set up yet.
    """
    sent: Counter[str] = Counter()
    for name, crossings in CROSSINGS.items():
        real = getattr(torch.distributed, name)

        def counted(*arguments: Any, real: Any = real, crossings: int = crossings, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            largest = max(tensors, key=Tensor.numel)
            sent[str(largest.dtype)] += crossings * largest.numel()
            sent["misaligned"] += sum(tensor.data_ptr() % 16 > 0 for tensor in tensors)
            return real(*arguments, **options)

        setattr(torch.distributed, name, counted)
    return sent
