"""Optimizers that need whole matrices, under ZeRO: what they are told, what they keep."""

from collections.abc import Iterator

from vitscale.engine import zero
from vitscale.engine.fragments import Untrained
from vitscale.optim.adafactor import Adafactor
from vitscale.optim.slices import Layout, Slice, Sliced

# What a statistic is called in a checkpoint; no parameter has a name with a slash.
STATISTIC = "exp_avg_sq/{}"


def place(ds: zero.DeepSpeed) -> None:
    """Tell such an optimizer which parts of the matrices this rank has; every rank calls it."""
    if not isinstance(ds.basic_optimizer, Sliced):
        return
    shapes, flats = zero.shapes(ds.module), zero.flats(ds)
    names = {id(param): name for name, param in ds.module.named_parameters()}
    slices: list[list[Slice]] = [[] for _ in flats]
    for fragment in zero.fragments(ds):
        where = Slice(fragment.name, fragment.start, fragment.count, fragment.offset)
        slices[fragment.group].append(where)
    layouts = {}
    for flat, params, held in zip(flats, zero.params_of_flats(ds), slices, strict=True):
        members = [names[id(param)] for param in params]
        layouts[flat] = Layout({name: shapes[name] for name in members}, held)
    ds.basic_optimizer.place(layouts)


def statistics(ds: zero.DeepSpeed) -> Iterator[Untrained]:
    """What the optimizer keeps of whole parameters, alike on every rank, 1-D."""
    if isinstance(ds.basic_optimizer, Adafactor):
        for name, tensor in ds.basic_optimizer.statistics.items():
            yield zero.alike_on_all(STATISTIC.format(name), tensor)
