"""What training, checkpoints and evaluations ask of a model of any kind."""

import abc
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol, get_args, overload, runtime_checkable

import torch
from torch import Tensor, nn

from vitscale.config import choose
from vitscale.image_size import ImageSize, sides
from vitscale.models.compiled import check_cache, compile_options
from vitscale.models.layers import Checkpointing, RecomputedBlock


@runtime_checkable
class CommonConfig(Protocol):
    """What the config of every kind of model says."""

    @property
    def kind(self) -> str: ...

    @property
    def image_size(self) -> ImageSize: ...

    @property
    def num_classes(self) -> int: ...


class Model(nn.Module, abc.ABC):
    """Images to logits, and to the features before the head."""

    config: CommonConfig

    def __init__(self, config: CommonConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def forward(
        self,
        images: Tensor,
        features_only: bool = False,
        tokens: bool = False,
        layers: Sequence[int] | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [B, num_classes], or with `features_only` (or without a head) features [B, D].

        images: float pixels in [-1, 1], [B, 3, H, W]; ValueError says what else came.
        tokens, layers: as in features. kept: [depth, 2, B, 1, 1], which branches of the blocks
        count for which image, by how much; None = all of them, also in training mode. The
        caller draws it in each step (drop_path.draw_kept).
        """

    @overload
    def features(self, images: Tensor, *, tokens: bool = False) -> Tensor: ...
    @overload
    def features(
        self, images: Tensor, *, tokens: bool = False, layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]: ...
    def features(
        self, images: Tensor, *, tokens: bool = False, layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The representation before the head, [B, D], of float pixels in [-1, 1], [B, 3, H, W].

        tokens: instead, what detection and segmentation build on: the patch tokens after the
            final norm, [B, N, D], row by row of the grid, without the class token.
        layers: also return a list of such tokens after these blocks, which count from 0; each
            went through the final norm.

        Raises ValueError for other images, and for blocks that the model does not have. A
        ResNet's tokens are the places of its last map; it takes no `layers`.
        """
        # Not self.forward: ZeRO 3 gathers parameters in hooks.
        return self(images, features_only=True, tokens=tokens, layers=layers)

    @abc.abstractmethod
    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The initial value of every parameter, by name, from `seed` alone, fp32 on the CPU.

        One tensor is in memory at a time, and the model itself may have no values. A name may
        come twice: its last value counts.
        """

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with its initial value, and the buffers."""
        self.init_buffers()
        params = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            params[name].copy_(value)

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

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """What each block keeps for the backward pass, which recomputes the rest.

        "none" keeps all activations, "selective" the outputs of matmuls, convolutions and
        attention, and "full" the block's input alone. Raises ConfigError for another word.
        """
        choose(mode, get_args(Checkpointing), "mode")
        for block in self._blocks():
            block.checkpointing = mode

    def compile_blocks(self) -> None:
        """torch.compile the repeated blocks, in place, so that parameter names stay.

        Shapes are static: blocks of one shape share a graph, made for the micro batch of
        training. A ViT has one, and another for its last block if only the class token is read;
        axial attention has one for rows and one for columns, and each stage of a ResNet two.

        Raises ConfigError for a cache of torch.compile that other users can write.
        """
        check_cache()
        # With recomputation, torch warns of in-place operations, which no block has.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for block in self._blocks():
            block.compile(dynamic=False, options=compile_options())

    def _blocks(self) -> list[RecomputedBlock]:
        return [block for block in self.modules() if isinstance(block, RecomputedBlock)]


def check_images(images: Tensor, size: ImageSize) -> None:
    """Raise ValueError for what people give: bytes, one image, another size than `size`."""
    shape, (height, width) = list(images.shape), sides(size)
    if not images.is_floating_point():
        raise ValueError(
            f"images are {str(images.dtype).removeprefix('torch.')}; this model takes floats in [-1, 1]: "
            "(images.float() - 127.5) / 127.5"
        )
    if len(shape) != 4 or shape[1] != 3:
        one = ": images[None] makes a batch of one image" if shape == [3, height, width] else ""
        raise ValueError(f"images are {shape}; this model takes [B, 3, {height}, {width}]{one}")
    if shape[2:] != [height, width]:
        raise ValueError(f"images of {shape[2]} x {shape[3]} pixels; this model takes {height} x {width}")
