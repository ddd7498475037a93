"""What test_loss_scaler.py runs apart: DeepSpeed's scaler asks for the rank."""

import json
from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from multiprocess.ranks import HasFp16
from multiprocess.reduction import MICRO_BATCH, made, micro_batch
from torch.nn.functional import cross_entropy

from vitscale import distributed
from vitscale.engine import setup, zero
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine
from vitscale.engine.fragments import Counters
from vitscale.optim.optimizers import OptimConfig

# Whether each step overflows: first the scale is too high, later there is a step now and then.
OVERFLOWS = [True, True, True, *[False] * 7, True, *[False] * 5, True, False, False]


def engine() -> Any:
    """What zero.py reads of a DeepSpeed engine in fp16."""
    scaler = DynamicLossScaler(
        init_scale=2**16,
        scale_window=4,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )
    return SimpleNamespace(
        fp16_enabled=lambda: True,
        gradient_accumulation_steps=lambda: 2,
        optimizer=SimpleNamespace(loss_scaler=scaler),
    )


def scales(ds: Any, overflows: list[bool]) -> list[float]:
    """The scale after each step."""
    after = []
    for overflow in overflows:
        ds.optimizer.loss_scaler.update_scale(overflow)
        after.append(ds.optimizer.loss_scaler.cur_scale)
    return after


def resume_at_every_step() -> None:
    """The scale after a resume is as if there had been none."""
    distributed.initialize()
    setup.prepare()
    expected = scales(engine(), OVERFLOWS)
    assert len(set(expected)) == 3, expected  # it falls, and rises again
    num_others = 0
    for step in range(len(OVERFLOWS)):
        before, after, without = engine(), engine(), engine()
        done = scales(before, OVERFLOWS[:step])
        saved = json.loads(json.dumps(zero.loss_scaler(before)))  # as a manifest keeps it, for any ranks
        counters = Counters(global_steps=step, global_samples=8 * step, skipped_steps=sum(OVERFLOWS[:step]))
        zero.restore_counters(after, counters, saved)
        assert done + scales(after, OVERFLOWS[step:]) == expected
        assert zero.counters(after) == counters and after.micro_steps == 2 * step
        zero.restore_counters(without, counters, {})
        num_others += done + scales(without, OVERFLOWS[step:]) != expected
    assert num_others > len(OVERFLOWS) // 2  # the control


def resume_in_another_precision() -> None:
    """Other precisions have no scaler, and take none from a checkpoint of a run in fp16."""
    ds = engine()
    ds.fp16_enabled = lambda: False
    assert zero.loss_scaler(ds) == {}
    zero.restore_counters(ds, Counters(), {"cur_scale": 8.0})
    assert ds.optimizer.loss_scaler.cur_scale == 2**16


def update_at_every_scale() -> None:
    """The optimizer gets the same gradient in every step, also where the scale grows."""
    HasFp16().arm()
    distributed.initialize()
    # Without momentum, SGD's buffer is the gradient that it got. The weights stay as they are.
    optim = OptimConfig(name="sgd", lr=1e-12, momentum=0.0, clip_norm=0.0)
    grows_every_2 = {"fp16": {"loss_scale_window": 2}}
    plan = plan_batches(MICRO_BATCH, MICRO_BATCH, 1)
    images, labels = micro_batch(0, 0)
    for stage in (1, 2, 3):
        options = EngineConfig(zero_stage=stage, deepspeed_extra=grows_every_2)
        engine, scales, norms = Engine(made(), optim, options, plan, "fp16"), [], []
        for _ in range(5):
            loss = cross_entropy(engine.forward(images).float(), labels)
            engine.backward(loss / 64)  # no overflow
            engine.step()
            scales.append(engine.loss_scaler["cur_scale"])
            squares = [grad.square().sum().item() for grad in engine.owned()["momentum_buffer"].values()]
            norms += [engine.grad_norm().item(), sum(squares) ** 0.5]
        assert scales == [2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**18]
        assert max(norms) < (1 + 1e-6) * min(norms), (stage, norms)
        engine.close()
