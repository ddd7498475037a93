"""What each rank owns of every parameter under ZeRO 1, 2 and 3, and how to put it back.

The only module that reads DeepSpeed's private names (0.19.8). A changed name fails loudly; a changed layout
would be silent, so check_mapping compares the map with the live weights before every save.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vitscale import distributed
from vitscale.checkpoint.format import FIXED

OPTIMIZER_STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@runtime_checkable
class FragmentSource(Protocol):
    """Where the values of a restore come from."""

    def read_into(self, destination: Tensor, state: str, name: str, start: int) -> None:
        """destination[:] = the `state` of parameter `name`, flattened, from `start` on."""
        ...


@dataclasses.dataclass(frozen=True)
class WholeTensors:
    """A source of plain tensors by name: initialisation, or weights from another model."""

    tensors: dict[str, Tensor]

    def read_into(self, destination: Tensor, state: str, name: str, start: int) -> None:
        destination.copy_(self.tensors[name].reshape(-1)[start : start + len(destination)])


@dataclasses.dataclass(frozen=True)
class Fragment:
    """This rank owns param.flatten()[start : start + count]; its fp32 master is flats[group][offset :
    offset + count].
    """

    name: str
    param: nn.Parameter
    start: int
    count: int
    group: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's part of a tensor laid out like `flat` (the master, an optimizer state, an
        average).
        """
        return tensor.detach().narrow(0, self.offset, self.count)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A frozen parameter or a persistent buffer: this rank writes `mine`, which begins at `start` of the
    flattened tensor, and must read `held`, which begins at `held_start`.
    """

    name: str
    mine: Tensor
    start: int
    held: Tensor
    held_start: int


def fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments that this rank owns, in the order of the module's parameters."""
    optimizer, buffers = engine.optimizer, flats(engine)
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if hasattr(param, "ds_id"):  # ZeRO 3: each rank holds ceil(numel / world) of each one, padded
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(param)]
            start = torch.distributed.get_rank(group=param.ds_process_group) * padded
            count = min(padded, param.ds_numel - start)
        else:  # ZeRO 1 and 2: each parameter group is one flat buffer, cut in world_size equal parts
            mapping = param._hp_mapping
            if mapping is None:
                continue
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        if count > 0:
            yield Fragment(name, param, start, count, group, buffers[group], offset)


def fixed(engine: Any) -> Iterator[Fixed]:
    """What is not trained: frozen parameters, and persistent buffers, which every rank holds whole."""
    module = engine.module
    persistent = module.state_dict(keep_vars=True)
    named = [(name, param) for name, param in module.named_parameters() if not param.requires_grad]
    named += [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]
    rank, world = distributed.rank(), distributed.world_size()
    for name, tensor in named:
        if hasattr(tensor, "ds_id"):  # ZeRO 3 cuts frozen parameters too
            held, each = tensor.ds_tensor.data.view(-1), tensor.ds_tensor.ds_numel
            start = torch.distributed.get_rank(group=tensor.ds_process_group) * each
            held = held[: max(0, min(each, tensor.ds_numel - start))]
            yield Fixed(name, held, start, held, start)
        else:
            held = tensor.data.view(-1)
            each = -(-len(held) // world)
            start = min(rank * each, len(held))
            yield Fixed(name, held[start : start + each], start, held, 0)


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and persistent buffer, whole."""
    module = engine.module
    tensors = dict(module.named_parameters())
    tensors |= {name: b for name, b in module.named_buffers() if name in module.state_dict(keep_vars=True)}
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}


def owned_states(engine: Any, states: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """{state: {parameter: 1-D fragment}} of this rank, as views; "fp32" is the master. Raises where the map
    is wrong.
    """
    check_mapping(engine)
    found: dict[str, dict[str, Tensor]] = {state: {} for state in states}
    for fragment in fragments(engine):
        held = {"fp32": fragment.flat, **engine.basic_optimizer.state.get(fragment.flat, {})}
        for state in states:
            found[state][fragment.name] = fragment.of(held[state])
    return found


def optimizer_steps(engine: Any) -> int:
    """Updates made so far: steps without those skipped for overflow."""
    return int(engine.global_steps - engine.skipped_steps)


@torch.no_grad()
def check_mapping(engine: Any) -> None:
    """Raise on every rank if on any a live weight is not the cast of the master that the map gives it. Every
    rank calls it.
    """
    wrong = ""
    for fragment in fragments(engine):
        param = fragment.param
        if hasattr(param, "ds_id"):
            live = param.ds_tensor.data.view(-1)[: fragment.count]  # type: ignore[union-attr]
        else:
            live = param.data.view(-1)[fragment.start : fragment.start + fragment.count]
        if not torch.equal(live, fragment.of(fragment.flat).to(live)):
            wrong = fragment.name
            break
    if distributed.all_reduce_max([float(bool(wrong))])[0]:
        raise RuntimeError(
            f"the map of ZeRO fragments is wrong{f' for {wrong}' if wrong else ' on another rank'}: nothing "
            "was saved; this DeepSpeed lays its state out in another way than 0.19.8"
        )


@torch.no_grad()
def restore(engine: Any, source: FragmentSource, states: Sequence[str], steps: int) -> None:
    """Fill masters, optimizer states and what is fixed from `source`, then the live weights from the masters.
    Every rank calls it.

    states: those to read beside "fp32"; steps: the optimizer's update count. With no steps the optimizer
    starts fresh.
    """
    if steps > 0:
        _create_optimizer_state(engine, states, steps)
    for fragment in fragments(engine):
        source.read_into(fragment.of(fragment.flat), "fp32", fragment.name, fragment.start)
        for state in states if steps > 0 else ():
            held = engine.basic_optimizer.state[fragment.flat][state]
            source.read_into(fragment.of(held), state, fragment.name, fragment.start)
    for piece in fixed(engine):
        if len(piece.held):
            source.read_into(piece.held, FIXED, piece.name, piece.held_start)
    refresh_live(engine)
    check_mapping(engine)


def loss_scaler(engine: Any) -> dict[str, Any]:
    """The numbers of the fp16 loss scaler; empty in other precisions."""
    if not engine.fp16_enabled():
        return {}
    return {k: v for k, v in vars(engine.optimizer.loss_scaler).items() if isinstance(v, int | float | bool)}


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's step counters."""
    return {name: int(getattr(engine, name)) for name in COUNTERS}


def restore_counters(engine: Any, saved: dict[str, int], scaler: dict[str, Any]) -> None:
    """Set the step counters, and the loss scaler where both sides have one."""
    for name in COUNTERS:
        setattr(engine, name, saved[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if scaler and engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(scaler)


def flats(engine: Any) -> list[Tensor]:
    """The flat fp32 master buffers: ZeRO 3's sub-groups, ZeRO 1/2's groups, or those of ZeRO 1 with fp32
    accumulation.
    """
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    raise RuntimeError(f"{type(engine.optimizer).__name__} keeps no fp32 masters that can be checkpointed")


def _create_optimizer_state(engine: Any, states: Sequence[str], steps: int) -> None:
    """DeepSpeed creates the state in the first step; a restore needs it before."""
    optimizer, base = engine.optimizer, engine.basic_optimizer
    groups = base.param_groups
    for number, flat in enumerate(flats(engine)):
        group = groups[
            optimizer.sub_group_to_group_id[number] if engine.zero_optimization_stage() == 3 else number
        ]
        held = base.state[flat]
        for state in states:
            if held.get(state) is None:
                held[state] = torch.zeros_like(flat)
        if type(base).__module__.startswith("deepspeed"):
            held["step"] = steps
        elif "exp_avg" in states:
            on_device = group.get("fused") or group.get("capturable")
            held["step"] = torch.tensor(float(steps), device=flat.device if on_device else "cpu")
    if engine.zero_optimization_stage() < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def refresh_live(engine: Any) -> None:
    """Live (low-precision, gathered) parameters from the masters; every rank calls it."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # partitions what is gathered
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers the persistent small parameters again
