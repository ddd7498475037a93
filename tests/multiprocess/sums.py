"""The fp32 sums of gradients in bf16 at ZeRO 1: what they begin with, how they are divided."""

from typing import Any

import torch
from multiprocess.reduction import MICRO_BATCH, OPTIM, made, micro_batch, step
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale import distributed
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine


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
    """Train two engines side by side, one of whose sums hold NaN before each step.

    The head gets no gradient in the first micro step, and none in the second step. No
    parameter of a block, nor its gradient, is copied to fp32.
    """
    distributed.initialize()
    config, plan = EngineConfig(), plan_batches(2 * 2 * MICRO_BATCH, MICRO_BATCH, 2)
    plain, poisoned = (Engine(made(), OPTIM, config, plan, "bf16") for _ in range(2))
    weights = [*plain.module.blocks.parameters()]
    forbidden = {shape for weight in weights for shape in (weight.shape, torch.Size([weight.numel()]))}
    for features_only in ((True, False), (True, True)):
        for sums in poisoned._ds.optimizer.fp32_groups_gradients:
            torch._foreach_mul_(sums, float("nan"))
        for engine in (plain, poisoned):
            for micro_step, only in enumerate(features_only):
                images, _ = micro_batch(distributed.rank(), micro_step)
                with Fp32Copies() as copies:
                    engine.backward(engine.forward(images, features_only=only).float().square().mean())
                assert not copies.shapes & forbidden
                engine.step()
        slots = plain.owned(), poisoned.owned()
        for slot, held in slots[0].items():
            for name, values in held.items():
                assert torch.equal(values, slots[1][slot][name]), (slot, name)
