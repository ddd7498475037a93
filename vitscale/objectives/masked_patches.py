"""Corrupted patches are predicted, without labels (appendix B.1.2 of the paper)."""

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitscale.config import check_choices
from vitscale.data.transforms import normalize
from vitscale.errors import ConfigError
from vitscale.models.corruption import Corruption, draw_corruption
from vitscale.models.layers import to_patches
from vitscale.objectives.objective import BatchKey, Forward

COLORS = 512  # of 3 bits for each of three channels
DOWNSIZED = 4  # side in pixels of a downsized patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPatchesConfig:
    """Predict corrupted patches, without labels ([objective] with kind = "masked_patches").

    Masked patch prediction of the ViT paper (appendix B.1.2): BERT's objective for images.

    target:     what is predicted of a patch, and by how many outputs (model.num_patch_outputs):
                "mean_color", as one of 512 colours; "downsized_patch", the patch at 4 x 4
                pixels of such colours, 16 * 512 outputs; "regression", all its values in
                [-1, 1], by their squared error, 3 P^2 outputs with a patch size P
    corrupted:  the share of each image's patches that are corrupted, and predicted
    masked:     of these, the share whose embedding is replaced by a learned one
    replaced:   of these, the share whose embedding is replaced by that of another patch of the
                image; the rest stay as they are
    """

    kind: Literal["masked_patches"] = "masked_patches"
    target: Literal["mean_color", "downsized_patch", "regression"] = "mean_color"
    corrupted: float = 0.5
    masked: float = 0.8
    replaced: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.corrupted <= 1:
            raise ConfigError(f"objective.corrupted {self.corrupted} must lie in (0, 1]; the paper has 0.5")
        if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1:
            raise ConfigError(
                f"objective.masked {self.masked} and objective.replaced {self.replaced} must not be "
                "negative, nor above 1 together; the paper has 0.8 and 0.1"
            )

    def num_outputs(self, patch_size: int) -> int:
        """Outputs of the patch head for each patch."""
        outputs = {
            "mean_color": COLORS,
            "downsized_patch": DOWNSIZED**2 * COLORS,
            "regression": 3 * patch_size**2,
        }
        return outputs[self.target]

    def num_corrupted(self, num_patches: int) -> int:
        """How many patches of an image are corrupted: as many of each, and at least one."""
        return max(1, round(self.corrupted * num_patches))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPatches:
    """Cross-entropy of the colours, or squared error of the values, of the corrupted patches.

    It is the mean over all that is predicted. The images have equally many corrupted patches,
    so it is also the mean of the images' losses, however the global batch is cut.
    """

    config: MaskedPatchesConfig
    patch_size: int

    def loss(
        self,
        forward: Forward,
        images: UInt8[Tensor, "B 3 H W"],
        labels: Int64[Tensor, "B M"],
        key: BatchKey,
    ) -> Float[Tensor, ""]:
        config, pixels = self.config, normalize(images, torch.float32)
        num_patches = math.prod(images.shape[2:]) // self.patch_size**2
        drawn = draw_corruption(
            num_patches,
            config.num_corrupted(num_patches),
            masked=config.masked,
            replaced=config.replaced,
            count=len(images),
            **key._asdict(),
        )
        # With non_blocking torch does not wait; CUDA may, to stage what is not pinned.
        corruption = Corruption(*(part.to(images.device, non_blocking=True) for part in drawn))
        outputs = forward(pixels, corruption=corruption).float()  # [B, k, X]
        rows = torch.arange(len(images), device=images.device)[:, None]  # [B, 1]
        if config.target == "regression":
            values = to_patches(pixels, self.patch_size)[rows, corruption.corrupted]  # [B, k, X]
            return F.mse_loss(outputs, values)
        side = DOWNSIZED if config.target == "downsized_patch" else 1
        colors = patch_colors(images, self.patch_size, side)[rows, corruption.corrupted]  # [B, k, s^2]
        return F.cross_entropy(outputs.reshape(-1, COLORS), colors.flatten())


def patch_colors(images: UInt8[Tensor, "B 3 H W"], patch_size: int, side: int) -> Int64[Tensor, "B n cells"]:
    """The colour of each patch at side x side pixels, row by row, as one of 512.

    A channel's mean m in [0, 1] falls into bin min(7, floor(8 m)), and the colour is

        red bin + 8 * green bin + 64 * blue bin

    in integers, so that every device agrees on the bin of a mean on an edge.
    """
    size = patch_size // side
    patches = to_patches(images.long(), patch_size)  # [B, n, 3 P P]
    cells = patches.unflatten(-1, (3, side, size, side, size)).sum((-3, -1))  # [B, n, 3, s, s]
    bins = (8 * cells // (255 * size**2)).clamp(max=7)
    red, green, blue = bins.flatten(-2).unbind(2)  # [B, n, s^2] each
    return red + 8 * green + 64 * blue
