"""Big Transfer's ResNets (BiT, arXiv 1912.11370): v2, GroupNorm, standardised weights.

They compute what big_vision models/bit_paper.py and big_transfer bit_pytorch/models.py do, to
the epsilons and the padding, so that Google's .npz files give the same logits here.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscale.config import check_choices
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, sides, written
from vitscale.models.initializers import lecun_normal
from vitscale.models.layers import Fp32Linear, RecomputedBlock
from vitscale.models.limits import MAX_IMAGE_SIZE, MAX_SIZE
from vitscale.models.model import Model, check_images
from vitscale.models.posemb import Grid

# Blocks of each stage by depth (big_vision models/bit.py). BiT published R50x1, R50x3, R101x1,
# R101x3, R152x2 and R152x4; the ViT paper also trains R50x2, R152x1 and R200x3.
STAGES = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
ROOT_WIDTH = 64  # channels at x1
ROOT_KERNEL = 7
GROUPS = 32
EXPANSION = 4  # a block gives so many times the channels of its 3 x 3 convolution
NORM_EPS, WEIGHT_EPS = 1e-5, 1e-10
MAX_STAGES = 8


class BlockShape(NamedTuple):
    """Channels into a block, of its 3 x 3 convolution, and out of it; and the maps' grids."""

    inputs: int
    mid: int
    outputs: int
    stride: int
    grid_in: Grid
    grid_out: Grid

    @property
    def has_projection(self) -> bool:
        return self.inputs != self.outputs or self.stride > 1

    @property
    def num_weights(self) -> int:
        """Of all convolutions of the block."""
        projection = self.inputs * self.outputs if self.has_projection else 0
        return self.inputs * self.mid + 9 * self.mid**2 + self.mid * self.outputs + projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A BiT ResNet ([model] with kind = "resnet").

    variant:      R{DEPTH}x{FACTOR}: a depth of STAGES, and what multiplies 64 channels
    width:        channels of the first convolution, a multiple of 32; 0 = the variant's
    stages:       blocks of each stage; [] = the variant's
    image_size:   side of the square input in pixels, or [height, width]
    num_classes:  outputs of the head; 0 = no head
    head_bias:    initial bias of the head; for a sigmoid loss about -ln(num_classes)
    """

    kind: Literal["resnet"] = "resnet"
    variant: str = "R50x1"
    width: int = 0
    stages: tuple[int, ...] = ()
    image_size: ImageSize = 224
    num_classes: int = 1000
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        self._parse_variant()
        if not all(1 <= side <= MAX_IMAGE_SIZE for side in sides(self.image_size)):
            raise ConfigError(
                f"model.image_size {written(self.image_size)} must lie in [1, {MAX_IMAGE_SIZE:,}]"
            )
        if not 0 <= self.num_classes <= MAX_SIZE:
            raise ConfigError(f"model.num_classes {self.num_classes} must lie in [0, {MAX_SIZE:,}]")
        check_width("model.width", self.resolved_width)
        check_stages("model.stages", self.resolved_stages)

    def _parse_variant(self) -> tuple[int, int]:
        """The depth and the factor of the width."""
        parts = re.fullmatch(r"R(\d{1,3})x(\d{1,2})", self.variant)
        depth, factor = (int(parts[1]), int(parts[2])) if parts else (0, 0)
        if depth not in STAGES or not factor:
            raise ConfigError(
                f'model.variant "{self.variant}" is not R{{DEPTH}}x{{FACTOR}} with a depth of '
                f'{", ".join(map(str, STAGES))}; for example "R50x1"'
            )
        return depth, factor

    @property
    def title(self) -> str:
        return self.variant

    @property
    def resolved_width(self) -> int:
        return self.width or ROOT_WIDTH * self._parse_variant()[1]

    @property
    def resolved_stages(self) -> tuple[int, ...]:
        return self.stages or STAGES[self._parse_variant()[0]]

    @property
    def resolved_depth(self) -> int:
        """The number of blocks."""
        return sum(self.resolved_stages)

    @property
    def num_blocks(self) -> int:
        return self.resolved_depth

    @property
    def block_shapes(self) -> list[BlockShape]:
        return list(block_shapes(self.resolved_width, self.resolved_stages, self.image_size))

    @property
    def num_features(self) -> int:
        """Channels of the last map: the width of the features."""
        return EXPANSION * self.resolved_width * 2 ** (len(self.resolved_stages) - 1)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the last map."""
        grid = sides(self.image_size)
        for _ in range(1 + len(self.resolved_stages)):
            grid = halved(grid)
        return grid

    # BiT has neither; these say so to what asks every kind of model.
    @property
    def dropout(self) -> float:
        return 0.0

    @property
    def drop_path(self) -> float:
        return 0.0


def check_width(key: str, width: int) -> None:
    """Raise ConfigError for a number of channels of a first convolution that no model has."""
    if width < GROUPS or width % GROUPS or width > MAX_SIZE >> MAX_STAGES:
        raise ConfigError(
            f"{key} {width} must be a multiple of {GROUPS}, the groups of every norm, and at most "
            f"{MAX_SIZE >> MAX_STAGES:,}"
        )


def check_stages(key: str, stages: Sequence[int]) -> None:
    """Raise ConfigError for numbers of blocks that no model has."""
    if len(stages) > MAX_STAGES or not all(1 <= blocks <= MAX_SIZE for blocks in stages):
        raise ConfigError(
            f"{key} {list(stages)} must be at most {MAX_STAGES} numbers of blocks, each above 0, "
            "like [3, 4, 6, 3]"
        )


def halved(grid: Grid) -> Grid:
    """A map's grid after a layer of stride 2, here always padded by half of its kernel."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def block_shapes(width: int, stages: Sequence[int], image_size: ImageSize) -> Iterator[BlockShape]:
    """The shape of every block, in order. width: channels of the first convolution."""
    grid, inputs = halved(halved(sides(image_size))), width
    for stage, blocks in enumerate(stages):
        mid = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            grid_out = halved(grid) if stride == 2 else grid
            yield BlockShape(inputs, mid, EXPANSION * mid, stride, grid, grid_out)
            grid, inputs = grid_out, EXPANSION * mid


class StdConv2d(nn.Conv2d):
    """A convolution whose kernel is standardised: mean 0 and deviation 1 for each output."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        # (w - mean) / sqrt(variance + eps) over all of an output's weights: a layer norm, which
        # computes in fp32 for weights of 16 bits, too.
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=WEIGHT_EPS)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class PreActBottleneck(RecomputedBlock):
    """Block of ResNet v2: norm and ReLU before each convolution, the stride in the 3 x 3."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        inputs, mid, outputs = shape.inputs, shape.mid, shape.outputs
        self.norm1 = nn.GroupNorm(GROUPS, inputs, eps=NORM_EPS)
        self.downsample = StdConv2d(inputs, outputs, 1, shape.stride) if shape.has_projection else None
        self.conv1 = StdConv2d(inputs, mid, 1)
        self.norm2 = nn.GroupNorm(GROUPS, mid, eps=NORM_EPS)
        self.conv2 = StdConv2d(mid, mid, 3, shape.stride)
        self.norm3 = nn.GroupNorm(GROUPS, mid, eps=NORM_EPS)
        self.conv3 = StdConv2d(mid, outputs, 1)

    def _forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        active = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        active = F.relu(self.norm2(self.conv1(active)))
        active = F.relu(self.norm3(self.conv2(active)))
        return self.conv3(active) + shortcut


class ResNet(Model):
    """The BiT ResNet of a config. init_weights gives its parameters their values."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.root = StdConv2d(3, config.resolved_width, ROOT_KERNEL, stride=2)
        self.blocks = nn.ModuleList(map(PreActBottleneck, config.block_shapes))
        self.norm = nn.GroupNorm(GROUPS, config.num_features, eps=NORM_EPS)
        self.head = Fp32Linear(config.num_features, config.num_classes) if config.num_classes else None

    def forward(
        self,
        images: Tensor,
        features_only: bool = False,
        tokens: bool = False,
        layers: Sequence[int] | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        check_images(images, self.config.image_size)
        if layers is not None:
            raise ValueError(
                f"layers are {list(layers)}, but the blocks of a ResNet have maps of different sizes, which "
                "its final norm does not fit; leave layers out: tokens = True gives the last map"
            )
        assert kept is None, "a ResNet has no drop_path"
        x = self.root(images)  # [B, W, H / 2, W / 2]
        # BiT pads with zeros, and max_pool2d's own padding would be -inf: the values may all be
        # negative here, where no ReLU comes before.
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x))  # [B, D, h, w]
        if tokens:
            return x.flatten(2).transpose(1, 2)  # [B, N, D]
        x = x.mean((2, 3))
        return x if features_only or self.head is None else self.head(x)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """As big_vision models/bit_paper.py: LeCun normal kernels, and a head of 0.

        The head's bias is config.head_bias.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                yield f"{name}.weight", lecun_normal(module.weight, generator)
            elif isinstance(module, nn.GroupNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape)
                yield f"{name}.bias", torch.zeros(module.bias.shape)
        if self.head is not None:
            yield "head.weight", torch.zeros(self.head.weight.shape)
            yield "head.bias", torch.full(self.head.bias.shape, self.config.head_bias)

    def init_buffers(self) -> None:
        """There are none."""
