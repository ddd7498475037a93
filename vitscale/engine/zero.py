"""What each rank owns of every parameter under ZeRO 1, 2 and 3, and how to put it back.

With gradients.py and setup.py the only module that reads DeepSpeed's private names (0.19.8). A
changed name fails loudly. A changed layout would not, so check_mapping compares the map with
the live weights at every save.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vitscale import distributed
from vitscale.engine.fragments import FP32, UNTRAINED, Counters, Fragment, FragmentSource, Untrained, Wanted
from vitscale.engine.mapped import mapped_zeros

# deepspeed.DeepSpeedEngine, whose annotations lack most of the names that are read here.
DeepSpeed = Any


def hide_gathering(ds: DeepSpeed) -> None:
    """Let selective recomputation not see how ZeRO 3 gathers and releases parameters.

    PyTorch compares the operations of a recomputation with those of the forward pass, and the
    hooks in it gather what was released in between, each time in another order.
    """
    if ds.zero_optimization_stage() < 3:
        return
    coordinator = ds.optimizer.parameter_offload.get_param_coordinator()
    for name in ("fetch_sub_module", "release_sub_module"):
        setattr(coordinator, name, _without_modes(getattr(coordinator, name)))


def _without_modes(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        with _disable_current_modes():
            function(*arguments, **options)

    return run


def map_moments(ds: DeepSpeed, slots: Mapping[str, torch.dtype], folder: str) -> None:
    """Make the optimizer's slots as files of `folder`; every rank calls it, before any step.

    Raises StoreError on every rank if they cannot be made on one.
    """

    def make() -> None:
        for flat in flats(ds):
            for slot, dtype in slots.items():
                ds.basic_optimizer.state[flat][slot] = mapped_zeros(len(flat), folder, dtype)

    distributed.together(make)
    _create_optimizer_state(ds, slots, updates=0)


def fragments(ds: DeepSpeed) -> Iterator[Fragment]:
    """The fragments that this rank owns, in the order of the module's parameters."""
    optimizer, buffers = ds.optimizer, flats(ds)
    for name, param in ds.module.named_parameters():
        if not param.requires_grad:
            continue
        if hasattr(param, "ds_id"):  # ZeRO 3: each rank holds ceil(numel / world_size), padded
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(param)]
            start = torch.distributed.get_rank(group=param.ds_process_group) * padded
            count = min(padded, param.ds_numel - start)
        else:  # ZeRO 1 and 2: each group is one flat buffer, cut into world_size equal parts
            mapping = param._hp_mapping
            if mapping is None:
                continue
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        if count > 0:
            yield Fragment(name, param, start, count, group, buffers[group], offset)


def untrained(ds: DeepSpeed) -> Iterator[Untrained]:
    """Frozen parameters, and persistent buffers, which every rank holds whole."""
    module = ds.module
    persistent = module.state_dict(keep_vars=True)
    named = [(name, param) for name, param in module.named_parameters() if not param.requires_grad]
    named += [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]
    for name, tensor in named:
        if hasattr(tensor, "ds_id"):  # ZeRO 3 cuts frozen parameters too
            held, each = tensor.ds_tensor.data.view(-1), tensor.ds_tensor.ds_numel
            start = torch.distributed.get_rank(group=tensor.ds_process_group) * each
            held = held[: max(0, min(each, tensor.ds_numel - start))]
            yield Untrained(name, held, start, held, start)
        else:
            yield alike_on_all(name, tensor)


def alike_on_all(name: str, tensor: Tensor) -> Untrained:
    """A tensor that every rank holds whole."""
    held = tensor.data.view(-1)
    each = -(-len(held) // distributed.world_size())  # 10 values on 4 ranks: 3, 3, 3, 1
    start = min(distributed.rank() * each, len(held))
    return Untrained(name, held[start : start + each], start, held, 0)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The whole shape of every parameter and persistent buffer, even if ZeRO 3 has cut it."""
    persistent = module.state_dict(keep_vars=True)
    tensors = dict(module.named_parameters())
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}


def owned(ds: DeepSpeed, slots: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """{slot: {parameter: 1-D fragment}} of this rank, as views; "fp32" is the master.

    Raises RuntimeError if the map is wrong (check_mapping). Every rank calls it.
    """
    check_mapping(ds)
    owned: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
    for fragment in fragments(ds):
        state = ds.basic_optimizer.state.get(fragment.flat, {})
        held = {FP32: fragment.flat, **state}
        for slot in slots:
            if slot in held or not state:  # Muon has no second moment of matrices
                owned[slot][fragment.name] = fragment.of(held[slot])
    return owned


def read_scalars(scalars: Sequence[Tensor]) -> list[float]:
    """The values of tensors of one element: a GPU is waited for once, not for each of them."""
    if not scalars:  # a rank may own nothing
        return []
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()


@torch.no_grad()
def check_mapping(ds: DeepSpeed) -> None:
    """Compare every live weight with its master as the map says; every rank calls it.

    Raises RuntimeError on every rank if any live weight is not the cast of its master.
    """
    names, differs = list[str](), list[Tensor]()
    for fragment in fragments(ds):
        param = fragment.param
        if hasattr(param, "ds_id"):
            live = param.ds_tensor.data.view(-1)[: fragment.count]  # type: ignore[union-attr]
        else:
            live = param.data.view(-1)[fragment.start : fragment.start + fragment.count]
        names.append(fragment.name)
        differs.append(_differ(live, fragment.of(fragment.flat)))
    wrong = next((name for name, value in zip(names, read_scalars(differs), strict=True) if value), "")
    if distributed.any_of(bool(wrong)):
        raise RuntimeError(
            f"the map of ZeRO fragments is wrong{f' for {wrong}' if wrong else ' on another rank'}: nothing "
            "was saved; this DeepSpeed does not lay its state out as 0.19.8 does"
        )


def _differ(live: Tensor, master: Tensor) -> Tensor:
    """Whether a live weight is not the cast of its master, on its device."""
    if live.shape != master.shape:
        return torch.ones((), dtype=torch.bool, device=live.device)
    return (live != master.to(live)).any()


@torch.no_grad()
def fill(ds: DeepSpeed, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set the masters and untrained tensors of this rank from whole tensors, by name.

    Of a name that comes twice, the last value counts. Nothing is communicated, so the live
    weights do not follow before refresh_live.
    Every parameter must get a value: what was in its memory is no initial one.
    """
    seen = set[str]()
    expected = shapes(ds.module)
    owned = {fragment.name: fragment for fragment in fragments(ds)}
    held = {tensor.name: tensor for tensor in untrained(ds)}
    for name, whole in values:
        assert expected[name] == tuple(whole.shape), name
        seen.add(name)
        flat = whole.reshape(-1)
        if fragment := owned.get(name):
            fragment.of(fragment.flat).copy_(flat[fragment.start : fragment.start + fragment.count])
        elif tensor := held.get(name):
            tensor.held.copy_(flat[tensor.held_start : tensor.held_start + len(tensor.held)])
    lacking = {name for name, _ in ds.module.named_parameters()} - seen
    assert not lacking, f"no initial values of {', '.join(sorted(lacking))}"


@torch.no_grad()
def restore(
    ds: DeepSpeed,
    source: FragmentSource,
    slots: Mapping[str, torch.dtype],
    updates: int,
    others: Sequence[Wanted] = (),
) -> None:
    """Fill masters, optimizer slots and untrained tensors from `source`; every rank calls it.

    The live weights follow from the masters. slots: the optimizer's. updates: how many it has
    made; with 0 it starts fresh. others: what else to read on the way.
    """
    wanted = list(others)
    if updates > 0:
        _create_optimizer_state(ds, slots, updates)
    for fragment in fragments(ds):
        wanted.append(Wanted(fragment.of(fragment.flat), FP32, fragment.name, fragment.start))
        held = ds.basic_optimizer.state[fragment.flat] if updates > 0 else {}
        for slot in slots:
            if slot in held:
                wanted.append(Wanted(fragment.of(held[slot]), slot, fragment.name, fragment.start))
    for tensor in untrained(ds):
        if len(tensor.held):
            wanted.append(Wanted(tensor.held, UNTRAINED, tensor.name, tensor.held_start))
    source.read(wanted)
    refresh_live(ds)
    check_mapping(ds)


def loss_scaler(ds: DeepSpeed) -> dict[str, int | float | bool]:
    """The numbers of the fp16 loss scaler; empty in other precisions."""
    if not ds.fp16_enabled():
        return {}
    return {k: v for k, v in vars(ds.optimizer.loss_scaler).items() if isinstance(v, int | float | bool)}


def counters(ds: DeepSpeed) -> Counters:
    names = [field.name for field in dataclasses.fields(Counters)]
    return Counters(**{name: int(getattr(ds, name)) for name in names})


def restore_counters(ds: DeepSpeed, saved: Counters, scaler: Mapping[str, int | float | bool]) -> None:
    """Set the step counters and, if the checkpoint and this run are fp16, the loss scaler."""
    for name, value in dataclasses.asdict(saved).items():
        setattr(ds, name, value)
    ds.micro_steps = saved.global_steps * ds.gradient_accumulation_steps()
    if scaler and ds.fp16_enabled():
        vars(ds.optimizer.loss_scaler).update(scaler)
    endure_overflows(ds)


def endure_overflows(ds: DeepSpeed) -> None:
    """Let steps overflow at the lowest loss scale, too: Health counts them and ends the run."""
    if ds.fp16_enabled():
        ds.optimizer.loss_scaler.raise_error_at_min_scale = False


# What names the flat master buffers, and the parameters of each, in every class of DeepSpeed.
_FLATS_AND_PARAMS = (
    ("fp32_partitioned_groups_flat", "fp16_groups"),  # ZeRO 3
    ("single_partition_of_fp32_groups", "bit16_groups"),  # ZeRO 1 and 2
    ("fp32_groups_flat_partition", "bf16_groups"),  # ZeRO 1 in bf16 with fp32 accumulation
)


def flats(ds: DeepSpeed) -> list[Tensor]:
    """The flat fp32 master buffers: one per group, or one per sub-group under ZeRO 3."""
    return _first_attribute(ds, [flats for flats, _ in _FLATS_AND_PARAMS])


def params_of_flats(ds: DeepSpeed) -> list[list[nn.Parameter]]:
    """The parameters of each flat buffer, also those that this rank has nothing of."""
    return _first_attribute(ds, [params for _, params in _FLATS_AND_PARAMS])


def _first_attribute(ds: DeepSpeed, names: Iterable[str]) -> Any:
    for name in names:
        if hasattr(ds.optimizer, name):
            return getattr(ds.optimizer, name)
    raise RuntimeError(f"{type(ds.optimizer).__name__} keeps no fp32 masters that can be checkpointed")


def _create_optimizer_state(ds: DeepSpeed, slots: Mapping[str, torch.dtype], updates: int) -> None:
    """Create the optimizer's state, which DeepSpeed does only in the first step."""
    optimizer, base = ds.optimizer, ds.basic_optimizer
    for index, flat in enumerate(flats(ds)):
        zero_3 = ds.zero_optimization_stage() == 3
        group = base.param_groups[optimizer.sub_group_to_group_id[index] if zero_3 else index]
        held = base.state[flat]
        for slot in group.get("slots", slots):
            if held.get(slot) is None:
                held[slot] = torch.zeros_like(flat, dtype=slots[slot])
        if type(base).__module__.startswith("deepspeed"):
            held["step"] = updates
        elif "exp_avg" in slots:
            on_device = group.get("fused") or group.get("capturable")
            held["step"] = torch.tensor(float(updates), device=flat.device if on_device else "cpu")
    if ds.zero_optimization_stage() < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def refresh_live(ds: DeepSpeed) -> None:
    """Set the live weights (low precision, gathered) from the masters; every rank calls it."""
    optimizer = ds.optimizer
    if ds.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # partitions the parameters that are gathered
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers the small persistent parameters again
