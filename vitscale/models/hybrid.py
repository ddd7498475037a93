"""The paper's hybrids (section 3.1): Vision Transformers on the feature map of a ResNet.

The ResNet is the stem of the patch embedding; all that follows is a ViT. It computes what
vision_transformer models_vit.py and models_resnet.py do, to the epsilons and the padding, and
so is not BiT's (resnet.py): norm and ReLU come after each convolution.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.models.initializers import lecun_normal
from vitscale.models.layers import PatchEmbed, RecomputedBlock
from vitscale.models.resnet import (
    EXPANSION,
    GROUPS,
    ROOT_KERNEL,
    ROOT_WIDTH,
    BlockShape,
    block_shapes,
    check_stages,
    check_width,
)
from vitscale.models.vit import ViT
from vitscale.models.vit_config import VARIANTS, Variant, ViTConfig
from vitscale.rng import derive_seed


class Stem(NamedTuple):
    """Blocks of each stage, and the pixels of an image to a side of a patch."""

    stages: tuple[int, ...]
    patch_size: int


# Sources: the paper, section 4.1 (of /16 the fourth stage's blocks are in the third), and
# vision_transformer configs/models.py. R+Ti/16 has no stage, and patches of 8 x 8 places of a
# map that has one place to 4 pixels: it is called 16, but its patches have 32 pixels.
STEMS = {
    "R/16": Stem((), 32),
    "R26/32": Stem((2, 2, 2, 2), 32),
    "R50/16": Stem((3, 4, 9), 16),
    "R50/32": Stem((3, 4, 6, 3), 32),
}
NORM_EPS, WEIGHT_EPS = 1e-6, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(ViTConfig):
    """A Vision Transformer on a ResNet's feature map ([model] with kind = "hybrid").

    Its keys are those of a ViT, of which these differ, and two more:

    variant:      STEM+NAME/NUMBER: a stem and number of STEMS, and a name of VARIANTS
    patch_size:   side of a patch in pixels, a multiple of the stem's stride; 0 = the variant's
    stem_width:   channels of the stem's first convolution, a multiple of 32; 0 = 64
    stem_stages:  blocks of each stage of the stem; [] = the variant's
    """

    # A kind is one literal of each config, which types cannot say of a subclass.
    kind: Literal["hybrid"] = "hybrid"  # pyright: ignore[reportIncompatibleVariableOverride]
    variant: str = "R50+B/16"
    stem_width: int = 0
    stem_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("model.stem_width", self.resolved_stem_width)
        check_stages("model.stem_stages", self.resolved_stem_stages)
        patch, stride = self.resolved_patch_size, self.stem_stride
        if patch % stride:
            raise ConfigError(
                f"model.patch_size {patch} must be a multiple of {stride}, the pixels to a side of a place "
                f"of the stem's map; use {-(-patch // stride) * stride}"
            )

    def _check_variant(self) -> None:
        key, name = _parse(self.variant)
        if key not in STEMS or name not in VARIANTS:
            raise ConfigError(
                f'model.variant "{self.variant}" is not STEM+NAME/NUMBER with STEM/NUMBER one of '
                f'{", ".join(STEMS)} and NAME one of {", ".join(VARIANTS)}; for example "R50+B/16"'
            )

    @property
    def _variant(self) -> Variant:
        return VARIANTS[_parse(self.variant)[1]]

    @property
    def _stem(self) -> Stem:
        return STEMS[_parse(self.variant)[0]]

    @property
    def resolved_patch_size(self) -> int:
        return self.patch_size or self._stem.patch_size

    @property
    def resolved_stem_width(self) -> int:
        return self.stem_width or ROOT_WIDTH

    @property
    def resolved_stem_stages(self) -> tuple[int, ...]:
        return self.stem_stages or self._stem.stages

    @property
    def num_blocks(self) -> int:
        return self.resolved_depth + sum(self.resolved_stem_stages)

    @property
    def stem_stride(self) -> int:
        """Pixels to a side of a place of the stem's last map."""
        return stem_stride(self.resolved_stem_stages)

    @property
    def stem_outputs(self) -> int:
        """Channels of the stem's last map."""
        stages = len(self.resolved_stem_stages)
        return (
            EXPANSION * self.resolved_stem_width * 2 ** (stages - 1) if stages else self.resolved_stem_width
        )

    @property
    def patch_places(self) -> int:
        """Places of the stem's last map to a side of a patch."""
        return self.resolved_patch_size // self.stem_stride

    @property
    def patch_inputs(self) -> int:
        return self.stem_outputs * self.patch_places**2

    @property
    def block_shapes(self) -> list[BlockShape]:
        """Of the stem's blocks, in order."""
        return list(block_shapes(self.resolved_stem_width, self.resolved_stem_stages, self.image_size))


def stem_stride(stages: Sequence[int]) -> int:
    """Pixels to a side of a place of a stem's last map: all stages but the first halve it."""
    return 4 * 2 ** max(0, len(stages) - 1)


def _parse(variant: str) -> tuple[str, str]:
    """The key of STEMS and the name of VARIANTS, as they stand in a variant."""
    stem, _, rest = variant.partition("+")
    name, _, number = rest.partition("/")
    return f"{stem}/{number}", name


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding of a side, before and after it.

    The output has ceil(side / stride) places. An odd rest goes after the side: a kernel of 3 at
    stride 2 pads a side of 8 by (0, 1), where torch's padding of 1 would be another model.
    """
    total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
    return total // 2, total - total // 2


class SameStdConv2d(nn.Conv2d):
    """A convolution with "SAME" padding, whose kernel is standardised for each output.

    (w - mean) / (deviation + 1e-5), where BiT's 1e-10 is under the root, with the variance.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        deviation, mean = torch.std_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        weight = ((weight - mean) / (deviation + WEIGHT_EPS)).to(x.dtype)
        top, bottom = same_padding(x.shape[-2], kernel, stride)
        left, right = same_padding(x.shape[-1], kernel, stride)
        if (top, left) == (bottom, right):
            return F.conv2d(x, weight, None, stride, (top, left))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride)


class PostActBottleneck(RecomputedBlock):
    """Block of ResNet v1: norm after each convolution, the stride in the 3 x 3, ReLU last."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        inputs, mid, outputs = shape.inputs, shape.mid, shape.outputs
        self.downsample = SameStdConv2d(inputs, outputs, 1, shape.stride) if shape.has_projection else None
        self.downsample_norm = _norm(outputs) if shape.has_projection else None
        self.conv1 = SameStdConv2d(inputs, mid, 1)
        self.norm1 = _norm(mid)
        self.conv2 = SameStdConv2d(mid, mid, 3, shape.stride)
        self.norm2 = _norm(mid)
        self.conv3 = SameStdConv2d(mid, outputs, 1)
        self.norm3 = _norm(outputs)

    def _forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        shortcut = x
        if self.downsample is not None and self.downsample_norm is not None:
            shortcut = self.downsample_norm(self.downsample(x))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(shortcut + self.norm3(self.conv3(y)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


class ResNetStem(nn.Module):
    """Images to the ResNet's last map. Its root alone leaves a quarter of each side."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.root = SameStdConv2d(3, config.resolved_stem_width, ROOT_KERNEL, stride=2)
        self.norm = _norm(config.resolved_stem_width)
        self.blocks = nn.ModuleList(map(PostActBottleneck, config.block_shapes))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        x = F.relu(self.norm(self.root(images)))  # [B, W, H / 2, W / 2]
        # Of an even side, "SAME" pads one place after it; ceil_mode lets windows reach over it.
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for block in self.blocks:
            x = block(x)
        return x


class HybridEmbed(PatchEmbed):
    """Images to tokens: a stem, and patches of its last map."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config.patch_places, config.resolved_width, config.stem_outputs)
        self.stem = ResNetStem(config)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        return super().forward(self.stem(images))


class Hybrid(ViT):
    """The hybrid of a config. init_weights gives its parameters their values."""

    config: HybridConfig

    def _make_patch_embed(self) -> PatchEmbed:
        return HybridEmbed(self.config)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """As ViT.initial_values, and of the stem as vision_transformer models_resnet.py:

        LeCun normal kernels, and norms of scale 1, but 0 for the last one of each block, which
        then passes its shortcut on.
        """
        yield from super().initial_values(seed)
        # Not the ViT's stream from its beginning.
        generator = torch.Generator().manual_seed(derive_seed(seed, "init", 1))
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                yield f"{name}.weight", lecun_normal(module.weight, generator)
            elif isinstance(module, nn.GroupNorm):
                scale = 0.0 if name.endswith(".norm3") else 1.0
                yield f"{name}.weight", torch.full(module.weight.shape, scale)
                yield f"{name}.bias", torch.zeros(module.bias.shape)
