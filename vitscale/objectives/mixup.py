"""Mixup and cutmix of a micro batch on its device, the same however the global batch is cut.

Positions 2i and 2i + 1 of the global batch are a pair, and every draw is keyed by (seed, step,
pair), so ranks and micro batches of even sizes mix alike without communication. The two of a
pair are each other's complement: each sample keeps its full weight in the batch.
"""

import numpy as np
import scipy.special
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitscale import rng
from vitscale.image_size import ImageSize, sides


def mix(
    images: Float[Tensor, "B 3 H W"],
    targets: Float[Tensor, "B C"],
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    seed: int,
    step: int,
    first_position: int,
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C"]]:
    """`images` and `targets`, mixed within pairs of neighbours.

    mixup, cutmix: the alpha of each one's lambda ~ Beta(alpha, alpha); 0 = off. If both are
    off, the inputs themselves are returned. switch: the probability of cutmix where both are
    on. first_position: row 0's position in the global batch; it must be even, and so must B.
    Mixing is done in float32, and each output has its input's dtype.
    Sources: Zhang et al., "mixup"; Yun et al., "CutMix". Deviation from both and from timm:
    a lambda is drawn per pair, not per batch.
    """
    if not mixup and not cutmix:
        return images, targets
    assert first_position % 2 == 0 and len(images) % 2 == 0, "a pair lies within one micro batch"
    size, first_pair = (images.shape[-2], images.shape[-1]), first_position // 2
    pairs = range(first_pair, first_pair + len(images) // 2)
    mixes = draw_mixes(pairs, size, mixup=mixup, cutmix=cutmix, switch=switch, seed=seed, step=step)
    # One small copy. With non_blocking torch does not wait for it; as the memory is not pinned,
    # CUDA may wait while it stages the copy.
    columns = torch.from_numpy(mixes.astype(np.float32)).to(images.device, non_blocking=True)
    target_weights = columns[:, 0, None]  # [P, 1]
    image_weights = pixel_weights(columns[:, 1:], size)[:, None]  # [P, 1, H, W]
    return _mix_pairs(images, image_weights), _mix_pairs(targets, target_weights)


def draw_mixes(
    pairs: range, size: ImageSize, *, mixup: float, cutmix: float, switch: float, seed: int, step: int
) -> Float64[np.ndarray, "P 6"]:
    """How each pair mixes. pairs: numbered through the global batch. size: of the images.

    The columns are the weight of a sample's own target, the weight of its own pixels outside
    the box, and the box: top, bottom, left, right. Inside the box, pixels are the partner's.
    Mixup's box is empty. Its lambda is at least 1/2, as in big_vision: this decides only which
    row of the pair is which. Cutmix's weight outside the box is 1.
    """
    ids = np.array([(step, pair, 0) for pair in pairs])  # [P, 3]; 0 is the id that a stream lacks
    kinds, centres = rng.uniform_rows(2, seed, ("mixup", "cutmix"), ids)  # [P, 2] each
    is_cutmix = kinds[:, 0] < (switch if mixup and cutmix else float(cutmix > 0))  # [P]
    alpha = np.where(is_cutmix, cutmix, mixup)
    lam = scipy.special.betaincinv(alpha, alpha, kinds[:, 1])  # [P]
    boxes = cutmix_boxes(lam, centres, size) * is_cutmix[:, None]  # [P, 4]
    areas, (height, width) = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]), sides(size)
    lam = np.where(is_cutmix, 1 - areas / (height * width), np.maximum(lam, 1 - lam))
    return np.column_stack([lam, np.where(is_cutmix, 1, lam), boxes])


def cutmix_boxes(
    lam: Float64[np.ndarray, " P"], centres: Float64[np.ndarray, "P 2"], size: ImageSize
) -> Float64[np.ndarray, "P 4"]:
    """Boxes (top, bottom, left, right) of about 1 - lam of an image, cut off at its edge.

    centres: (row, column), uniform in [0, 1). A box has the image's aspect ratio; its sides are
    rounded down to an even number of pixels, as in the authors' code. Since the edge may cut
    it, measure the area afterwards.
    """
    height_width = np.array(sides(size))  # [2]
    half_sides = (height_width * np.sqrt(1 - lam)[:, None]).astype(np.int64) // 2  # [P, 2]
    middle = (centres * height_width).astype(np.int64)
    low, high = np.clip(middle - half_sides, 0, height_width), np.clip(middle + half_sides, 0, height_width)
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1).astype(np.float64)


def pixel_weights(columns: Float[Tensor, "P 5"], size: ImageSize) -> Float[Tensor, "P H W"]:
    """The weight of a sample's own pixels: 0 inside the box, the first of `columns` outside."""
    outside, top, bottom, left, right = columns[:, :, None].unbind(1)  # [P, 1] each
    row, column = (torch.arange(side, device=columns.device) for side in sides(size))  # [H], [W]
    box_rows, box_columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    box = box_rows[:, :, None] & box_columns[:, None, :]  # [P, H, W]
    return torch.where(box, 0.0, outside[:, :, None])


def _mix_pairs(
    values: Float[Tensor, "B *rest"], weights: Float[Tensor, "P *ones"]
) -> Float[Tensor, "B *rest"]:
    """weight x each row + (1 - weight) x its neighbour."""
    paired = values.float().unflatten(0, (-1, 2))  # [P, 2, ...]
    return torch.lerp(paired.flip(1), paired, weights[:, None]).flatten(0, 1).to(values.dtype)
