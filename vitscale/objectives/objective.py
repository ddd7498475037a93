"""What a training step asks of an objective of any kind."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.models.corruption import Corruption


@runtime_checkable
class Forward(Protocol):
    """From fp32 pixels to logits [B, C]; it casts to the engine's dtype itself.

    With a corruption, to the outputs of the patch head for the corrupted patches [B, k, X];
    with separate_heads, to the logits of a distilled model's two heads [B, 2, C].
    """

    def __call__(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        /,
        *,
        corruption: Corruption | None = None,
        separate_heads: bool = False,
    ) -> Float[Tensor, "B *rest"]: ...


class BatchKey(NamedTuple):
    """Where a micro batch is in the run, which keys the randomness of its loss.

    first_position: row 0's position in the step's global batch. So a sample's loss is the same
    however the global batch is cut into ranks and micro batches.
    """

    seed: int
    step: int
    first_position: int


@runtime_checkable
class Objective(Protocol):
    """What a step minimises."""

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        """The mean loss of a micro batch on its device, in fp32. labels: padded with -1."""
        ...
