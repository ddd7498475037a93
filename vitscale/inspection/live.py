"""What a model has learned so far, seen while a run trains it: for TensorBoard.

All comes from one forward pass, in whose hooks the parameters are whole on every rank, at any
ZeRO stage.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale.data.transforms import normalize
from vitscale.inspection.attention import (
    Rollout,
    attention_distance,
    mean_row,
    observing,
)
from vitscale.inspection.mosaics import enlarged, filter_tiles, lit, position_mosaic
from vitscale.inspection.weights import (
    input_positions,
    position_similarity,
    principal_components,
    reads_pixels,
)
from vitscale.models.vit import ViT

SHOWN_IMAGES = 8  # those that attention is observed on
_FILTER_SIDE, _MOSAIC_SIDE = 64, 448  # pixels, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """Pictures by name, and the mean attention distance of each layer's heads, in pixels."""

    pictures: dict[str, UInt8[Tensor, "B 3 H W"]]
    distances: list[float]


def observe(
    model: ViT, forward: Callable[[Float[Tensor, "B 3 H W"]], object], images: UInt8[Tensor, "B 3 H W"]
) -> Learned:
    """Run the model once on a few images, and look.

    forward: runs the model, within which its hooks are called; every rank calls it.
    """
    config, device = model.config, model.norm.weight.device
    images = images[:SHOWN_IMAGES].to(device)
    patch, grid = config.resolved_patch_size, config.grid
    rollout, distances, weights = Rollout(), list[float](), dict[str, Tensor]()

    def look(layer: int, attention: Float[Tensor, "B K N N"]) -> None:
        rollout(layer, attention)
        distances.append(attention_distance(attention, grid, patch).nanmean().item())

    def keep(_: object, __: object) -> None:
        positions = input_positions(model)
        if positions is not None:
            weights.setdefault("positions", positions)

    def keep_kernel(_: object, __: object) -> None:
        weights["kernel"] = model.patch_embed.proj.weight.detach().float().cpu()

    handles = [
        model.register_forward_pre_hook(keep),
        model.patch_embed.proj.register_forward_pre_hook(keep_kernel),
    ]
    try:
        with torch.no_grad(), observing(model, look):
            forward(normalize(images, torch.float32))
    finally:
        for handle in handles:
            handle.remove()
    assert rollout.product is not None
    maps = mean_row(model, rollout.product)
    pictures = {"attention": torch.cat([images, lit(images, maps)], dim=3).cpu()}
    if "positions" in weights:
        positions = position_mosaic(position_similarity(weights["positions"], grid))
        pictures["positions"] = enlarged(positions, _MOSAIC_SIDE).permute(2, 0, 1)[None]
    if reads_pixels(model):
        filters = filter_tiles(principal_components(weights["kernel"], patch).filters)
        pictures["filters"] = enlarged(filters, _FILTER_SIDE).permute(0, 3, 1, 2)
    return Learned(pictures=pictures, distances=distances)
