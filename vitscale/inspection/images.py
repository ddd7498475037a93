"""Images as bright as they are attended to."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def lit(images: UInt8[Tensor, "B 3 H W"], maps: Float[Tensor, "B h w"]) -> UInt8[Tensor, "B 3 H W"]:
    """The images times maps of any scale: the largest value of a map leaves its pixels."""
    masks = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)  # [B 1 H W]
    masks = masks / masks.amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (images * masks).to(torch.uint8)
