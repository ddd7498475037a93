"""Steps in 16 bits on several ranks: how exact the mean gradient is, and what is sent."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from multiprocess.ranks import HasFp16
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale import distributed
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig, Precision
from vitscale.engine.engine import DTYPES, Engine
from vitscale.models import Model, build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim import OptimConfig

MODEL = ViTConfig(variant="Ti/4", width=48, depth=2, num_heads=3, mlp_dim=96, image_size=8, num_classes=10)
NUM_PARAMS = 41_146
# The first step of SGD at a rate of 1 subtracts the gradient.
OPTIM = OptimConfig(name="sgd", lr=1.0, clip_norm=0.0)
MICRO_BATCH = 4
LOSS_SCALE = 2.0**16  # with which fp16 begins; it changes no bit of what bf16 rounds
# How often what a collective is given crosses a GPU's link, times (n - 1) / n.
CROSSINGS = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


def measure(
    folder: Path, precision: Precision, accumulation: int, engines: Mapping[str, dict[str, Any]]
) -> None:
    """Steps of every engine, by name; NAME.json gets the error of its gradient, and elements.

    The error is that of the first step, relative to the norm of the exact mean. The elements
    are those that the second sends, by precision, as in formulas.Communication, and as "held"
    those of the gradients that the parameters still have after a backward pass. "misaligned"
    counts, on all ranks, what the second step sends and receives from elsewhere than multiples
    of 16 bytes.
    """
    HasFp16().arm()
    distributed.initialize()
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
        sent.clear()
        sent["held"] = step(engine, accumulation)
        sent["misaligned"] = round(distributed.all_reduce_sum([float(sent["misaligned"])])[0])
        if distributed.is_main():
            (folder / f"{name}.json").write_text(json.dumps([(error / whole) ** 0.5, sent]))
        engine.close()


def check_thirds() -> None:
    """Reduced in bf16 on three ranks, a mean is a third of a sum of bf16, rounded in fp32."""
    distributed.initialize()
    config = EngineConfig(reduce_precision="bf16")
    engine = Engine(made(), OPTIM, config, plan_batches(3 * MICRO_BATCH, MICRO_BATCH, 3), "bf16")
    step(engine, 1)
    for mean in engine.owned()["momentum_buffer"].values():
        torch.testing.assert_close(3 * mean, (3 * mean).bfloat16().float(), rtol=1e-6, atol=0)


class Fp32Copies(TorchDispatchMode):
    """Notes the shapes of what is copied from another precision to fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32:
            self.shapes.add(args[0].shape)
        return func(*args, **kwargs or {})


def check_sums() -> None:
    """Train beside each other an engine, and one whose sums hold NaN before each step.

    The head gets no gradient in the first micro step, and none in the second step. No
    parameter of a block, nor its gradient, is copied to fp32.
    """
    distributed.initialize()
    config, plan = EngineConfig(), plan_batches(2 * 2 * MICRO_BATCH, MICRO_BATCH, 2)
    plain, poisoned = (Engine(made(), OPTIM, config, plan, "bf16") for _ in range(2))
    for features_only in ((True, False), (True, True)):
        for sums in poisoned._ds.optimizer.fp32_groups_gradients:
            torch._foreach_mul_(sums, float("nan"))
        for engine in (plain, poisoned):
            for micro_step, only in enumerate(features_only):
                images, _ = micro_batch(distributed.rank(), micro_step)
                with Fp32Copies() as copies:
                    engine.backward(engine.forward(images, features_only=only).float().square().mean())
                assert not copies.shapes & {weight.shape for weight in engine.module.blocks.parameters()}
                engine.step()
        slots = plain.owned(), poisoned.owned()
        for slot, held in slots[0].items():
            for name, values in held.items():
                assert torch.equal(values, slots[1][slot][name]), (slot, name)


def made() -> Model:
    model = build_model(MODEL, 1)
    with torch.no_grad():  # a head of zeros would hide what is behind it
        model.head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def micro_batch(rank: int, micro_step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + micro_step)
    images = torch.randn(MICRO_BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (MICRO_BATCH,), generator=generator)


def mean_gradient(precision: Precision, world_size: int, accumulation: int) -> dict[str, Tensor]:
    """Of the gradients that plain PyTorch has for each micro batch, summed in fp64."""
    dtype = DTYPES[precision]
    total: dict[str, Tensor] = {}
    for rank in range(world_size):
        for micro_step in range(accumulation):
            model = made().to(dtype)
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
