"""What a rank owns of parameters under ZeRO, in words that know no DeepSpeed."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# A slot is something that training keeps of every parameter: the fp32 master weights, a state
# of the optimizer (exp_avg, ...), the average.
FP32, EMA = "fp32", "ema"
# Of the optimizer, with the dtype of each. Muon has no exp_avg_sq of what it makes orthogonal.
OPTIMIZER_SLOTS: Mapping[str, Mapping[str, torch.dtype]] = {
    "adamw": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "sgd": {"momentum_buffer": torch.float32},
    "adafactor": {"exp_avg": torch.bfloat16},
    "muon": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
}
UNTRAINED = "fixed"  # the only slot of an untrained tensor, as checkpoint files name it


@dataclasses.dataclass(frozen=True)
class Counters:
    """DeepSpeed's step counters."""

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0

    @property
    def updates(self) -> int:
        """Updates of the weights: all steps except those that fp16 skipped for an overflow."""
        return self.global_steps - self.skipped_steps


class Wanted(NamedTuple):
    """destination[:] = the `slot` of parameter `name`, flattened, from `start` on."""

    destination: Tensor
    slot: str
    name: str
    start: int


@runtime_checkable
class FragmentSource(Protocol):
    """Where a restore gets its values."""

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill every destination, in any order."""
        ...


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A piece of a trained parameter that this rank owns.

    It is param.flatten()[start : start + count]. Its master is flat[offset : offset + count],
    where `flat` is this rank's fp32 buffer of the group. A rank owns at most one fragment of a
    parameter. For example, a [3] and b [2, 3] are one group on two ranks:

        ZeRO 1: a and b in one buffer, padded from 9 to 16 values and cut in the middle
            rank 0    a[0:3] at offset 0, b[0:5] at offset 3
            rank 1    b[5:6] at offset 0
        ZeRO 3: each parameter cut by itself, into pieces of 2 and of 3 values
            rank 0    a[0:2] at offset 0, b[0:3] at offset 2
            rank 1    a[2:3] at offset 0, b[3:6] at offset 2
    """

    name: str
    param: nn.Parameter
    start: int
    count: int
    group: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's part of the buffer of any slot, which is laid out like `flat`."""
        return tensor.detach().narrow(0, self.offset, self.count)


@dataclasses.dataclass(frozen=True)
class Untrained:
    """A frozen parameter, a persistent buffer or a statistic of the optimizer, flattened.

    mine: what this rank saves, from `start` on: its share, so that all ranks save it once.
    held: what this rank restores, from `held_start` on: all of it, unless ZeRO cuts it.
    """

    name: str
    mine: Tensor
    start: int
    held: Tensor
    held_start: int
