"""One figure of one checkpoint: what tools/visualize.py asks for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale import distributed
from vitscale.data.decode import DamagedImage, decode
from vitscale.data.evalset import EvaluationSet
from vitscale.data.transforms import evaluation_view, normalize
from vitscale.errors import ConfigError, DataError
from vitscale.image_size import ImageSize
from vitscale.inspection import figures
from vitscale.inspection.attention import as_vit, attention_distance, attention_maps, observe_attention
from vitscale.inspection.weights import (
    input_positions,
    position_similarity,
    principal_components,
    reads_pixels,
)
from vitscale.models.vit import ViT
from vitscale.weights.saved import Slot, load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["filters", "posemb", "attention-distance", "attention-map"]
DEFAULT_IMAGES = {"attention-distance": 128, "attention-map": 8}  # 128 as in the paper
_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """The images that attention is computed for.

    data: shards, as open_index takes them; the images are drawn evenly from all. files: or
    image files. count: of the images from `data`; 0 = as many as the figure usually has.
    """

    data: str = ""
    files: Sequence[str] = ()
    count: int = 0


def visualize(kind: Kind, checkpoint: str, out: str, pictures: Pictures, *, slot: Slot = "fp32") -> None:
    """Draw a figure of a checkpoint, export or imported model, and write it as a PNG.

    Raises a UserError for what is no ViT, for images that cannot be read, and without
    matplotlib; nothing is written then.
    """
    model = as_vit(load_model(checkpoint, slot=slot, device=distributed.device()))
    figures.save(_draw(kind, model, pictures), out)


def _draw(kind: Kind, model: ViT, pictures: Pictures) -> "Figure":
    config = model.config
    if kind == "filters":
        if not reads_pixels(model):
            raise ConfigError(
                f'the patches of a model of kind "{config.kind}" are of features, not of pixels, so its '
                "filters are no pictures; draw posemb, attention-distance or attention-map"
            )
        kernel = model.patch_embed.proj.weight.detach().cpu()
        return figures.draw_filters(principal_components(kernel, config.resolved_patch_size))
    if kind == "posemb":
        positions = input_positions(model)
        if positions is None:
            raise ConfigError(
                f'a model with model.posemb = "{config.posemb}" adds no position embeddings to its tokens; '
                "draw filters, attention-distance or attention-map"
            )
        return figures.draw_positions(position_similarity(positions, config.grid))
    images = read_images(pictures, config.image_size, pictures.count or DEFAULT_IMAGES[kind])
    if kind == "attention-map":
        maps = [attention_maps(model, batch) for batch in _batches(model, images)]
        return figures.draw_maps(images, torch.cat(maps).cpu())
    return figures.draw_distances(*distances(model, images))


def distances(model: ViT, images: UInt8[Tensor, "B 3 H W"]) -> tuple[list[Float[Tensor, " K"]], float]:
    """The mean attention distance of each layer's heads, and of uniform attention (pixels)."""
    grid, patch = model.config.grid, model.config.resolved_patch_size
    sums = [torch.zeros(model.config.resolved_num_heads) for _ in range(model.config.resolved_depth)]
    for batch in _batches(model, images):

        def observe(layer: int, weights: Float[Tensor, "B K N N"]) -> None:
            sums[layer] += len(weights) * attention_distance(weights, grid, patch).cpu()

        observe_attention(model, batch, observe)
    patches = grid[0] * grid[1]
    uniform = attention_distance(torch.ones(1, 1, patches, patches), grid, patch)
    return [total / len(images) for total in sums], uniform.item()


def read_images(pictures: Pictures, size: ImageSize, count: int) -> UInt8[Tensor, "B 3 H W"]:
    """The images as model input. Raises ConfigError if none are named, DataError for damage."""
    if bool(pictures.data) == bool(pictures.files):
        raise ConfigError("attention is of images: give --data SHARDS or --images FILE ..., one of them")
    if pictures.files:
        return torch.stack([_read_file(file, size) for file in pictures.files])
    held = EvaluationSet.open(pictures.data, image_size=size)
    chosen = np.linspace(0, held.num_samples - 1, min(count, held.num_samples)).round().astype(np.int64)
    return torch.cat([images for images, _ in held.batches(chosen, _AT_ONCE)])


def _read_file(path: str, size: ImageSize) -> UInt8[Tensor, "3 H W"]:
    try:
        return evaluation_view(decode(Path(path).read_bytes()), "resize", size)
    except (OSError, DamagedImage) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _batches(model: ViT, images: UInt8[Tensor, "B 3 H W"]) -> list[Float[Tensor, "b 3 H W"]]:
    device = model.norm.weight.device
    return [normalize(part.to(device), torch.float32) for part in images.split(_AT_ONCE)]
