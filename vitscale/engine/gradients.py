"""How DeepSpeed 0.19.8 treats gradients from the backward pass to the update, corrected.

A changed private name of DeepSpeed fails loudly here, as in zero.py.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitscale import distributed
from vitscale.engine import zero
from vitscale.engine.setup import RANK_MULTIPLE
from vitscale.engine.zero import DeepSpeed


def correct(ds: DeepSpeed) -> None:
    """Put the corrections of this module into an engine; every rank calls it, before a step."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if ds.fp16_enabled():
        zero.endure_overflows(ds)
        _grow_scale_after_update(ds)
    if ds.zero_optimization_stage() < 3:
        sizes = [len(flat) for flat in zero.flats(ds)]
        assert not any(size % RANK_MULTIPLE for size in sizes), f"ranks own {sizes}: see RANK_MULTIPLE"
    if isinstance(ds.optimizer, BF16_Optimizer):  # in bf16 at ZeRO 1, without offload
        _overwrite_sums(ds.optimizer)
        _reduce_to_owners(ds)


def _replace(owner: Any, name: str, by: object) -> None:
    getattr(owner, name)  # raises if DeepSpeed no longer has it
    setattr(owner, name, by)


def _grow_scale_after_update(ds: DeepSpeed) -> None:
    """Let the loss scale grow after the update, not before the gradients are divided by it.

    DeepSpeed doubles it first, so that in such a step the gradients, which the old scale
    multiplied, would come out as half of what they are.
    """
    optimizer = ds.optimizer
    update_scale, step = optimizer._update_scale, optimizer.step

    def only_fall(overflow: bool) -> None:
        if overflow:
            update_scale(overflow)

    def step_and_grow() -> None:
        step()
        if not optimizer.overflow:
            update_scale(False)

    optimizer._update_scale, optimizer.step = only_fall, step_and_grow


def _overwrite_sums(optimizer: Any) -> None:
    """Let the first gradient of a step overwrite its fp32 sum, and add the others in one pass.

    DeepSpeed zeroes all sums after each step, and adds an fp32 copy of each gradient. The sums
    of parameters without a gradient are zeroed by _zero_others. Padding stays 0.
    """
    sums, has_sum = optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients

    @torch.no_grad()
    def add(param: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if param.grad is None:
            return
        total, grad = sums[group][index], param.grad.view(-1)
        if has_sum[group][index]:
            total.add_(grad)
        else:
            total.copy_(grad)
            has_sum[group][index] = True

    def forget() -> None:
        for group in has_sum:
            group[:] = [False] * len(group)

    _replace(optimizer, "_update_hp_grad", add)
    _replace(optimizer, "clear_hp_grads", forget)


def _zero_others(optimizer: Any) -> None:
    """Zero the sums of the parameters that got no gradient in this step."""
    groups = zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True)
    for sums, has_sum in groups:
        for total, has in zip(sums, has_sum, strict=True):
            if not has:
                total.zero_()


def _reduce_to_owners(ds: DeepSpeed) -> None:
    """Sum over ranks, norm and clip on each rank only the gradients that it updates with.

    DeepSpeed does each of these on every rank for all gradients: twice the communication, and
    n times the work on n ranks.
    """
    optimizer, group = ds.optimizer, ds.optimizer.dp_process_group
    parts = optimizer.fp32_groups_gradient_flat_partition
    pieces = _pieces(ds, parts) if distributed.device().type == "cpu" else parts
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)

    def reduce(**_: Any) -> None:
        _zero_others(optimizer)
        if world_size == 1:
            return
        for flat, part in zip(optimizer.fp32_groups_gradients_flat, parts, strict=True):
            sent = flat.to(ds.communication_data_type)  # flat itself, if that is fp32
            received = sent.chunk(world_size)[rank]  # in place, which NCCL allows
            dist.reduce_scatter_tensor(received, sent, group=group)
            torch.div(received.float(), world_size, out=part)

    _replace(ds, "buffered_allreduce_fallback", reduce)
    _replace(
        optimizer, "get_grads_for_norm", lambda for_clipping=False: parts if for_clipping else (pieces, {})
    )
    # Over this group the squares of the norms are summed.
    _replace(optimizer, "mpu", SimpleNamespace(get_model_parallel_group=lambda: group))
    # DeepSpeed's zero_grad also clears the sums, which step() has done.
    _replace(optimizer, "zero_grad", functools.partial(optimizer.clear_lp_grads, set_to_none=True))


def _pieces(ds: DeepSpeed, parts: list[Tensor]) -> list[Tensor]:
    """`parts` by parameter, since a CPU's norm of very many values is inexact."""
    owned = sorted(zero.fragments(ds), key=lambda fragment: (fragment.group, fragment.offset))
    # A rank may own padding alone.
    return [fragment.of(parts[fragment.group]) for fragment in owned] or parts


def drop(ds: DeepSpeed) -> None:
    """Forget the gradients of a step that was skipped.

    With offload in 16 bits, DeepSpeed adds those of the next step to them, at ZeRO 1 and 2, so
    that one NaN would make it skip all steps from then on.
    """
    if getattr(ds.optimizer, "cpu_offload", False):  # only that of ZeRO 1 and 2 has it
        for group in ds.optimizer.averaged_gradients:
            ds.optimizer.averaged_gradients[group] = None
