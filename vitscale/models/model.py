"""What training, checkpoints and evaluations ask of a model of any kind."""

import abc
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class CommonConfig(Protocol):
    """What the config of every kind of model says."""

    @property
    def image_size(self) -> int: ...

    @property
    def num_classes(self) -> int: ...


class Model(nn.Module, abc.ABC):
    """Images to logits, and to the features before the head."""

    config: CommonConfig

    def __init__(self, config: CommonConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"], features_only: bool = False) -> Float[Tensor, "B C"]:
        """Logits [B, num_classes], or with `features_only` (or without a head) features [B, D].

        images: pixels in [-1, 1].
        """

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The representation before the head."""
        return self(images, features_only=True)  # not self.forward: ZeRO 3 gathers parameters in hooks

    @abc.abstractmethod
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from `seed` alone, and the buffers."""

    @abc.abstractmethod
    def init_buffers(self) -> None:
        """Fill the buffers, which follow from the config."""

    def allocate(self, device: torch.device | str) -> "Model":
        """Move a model without values (empty_model) to a device, for somebody to fill.

        Its buffers are filled; its parameters have whatever was in the memory.
        """
        self.to_empty(device=device)
        self.init_buffers()
        return self

    @abc.abstractmethod
    def set_activation_checkpointing(self, mode: Literal["none", "full"]) -> None:
        """Keep all activations ("none"), or recompute each block in backward ("full")."""

    @abc.abstractmethod
    def compile_blocks(self) -> None:
        """torch.compile the repeated blocks, in place, so that parameter names stay."""
