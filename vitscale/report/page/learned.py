"""What the newest checkpoint of a run has learned: its filters, positions and attention."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from vitscale.data.transforms import normalize
from vitscale.inspection.attention import attention_maps
from vitscale.inspection.mosaics import enlarged, filter_tiles, lit, position_mosaic
from vitscale.inspection.weights import (
    input_positions,
    position_similarity,
    principal_components,
    reads_pixels,
)
from vitscale.models.vit import ViT
from vitscale.report.page.html import Html, element, joined, note
from vitscale.report.page.pictures import card, channels_last, gallery, picture

NUM_FILTERS = 14
_FILTER_SIDE = 48  # pixels of a filter on the page
_LARGEST_GRID = 16  # of positions: more do not fit
_MOSAIC_SIDE = 320


def learned(model: ViT, images: UInt8[Tensor, "B 3 H W"]) -> Html:
    """Pictures of the embedding layer, and of the attention to some images."""
    maps = attention_maps(model, normalize(images, torch.float32))
    attended = [
        card(picture(channels_last(pixels), "image weighted by attention"), f"image {number + 1}")
        for number, pixels in enumerate(lit(images, maps))
    ]
    return joined(
        [
            element("h3", "What the model has learned"),
            *_filters(model),
            *_positions(model),
            note("The images of the predictions, as bright as they are attended to (attention rollout):"),
            gallery(attended),
        ]
    )


def _filters(model: ViT) -> list[Html]:
    if not reads_pixels(model):
        return []
    patch = model.config.resolved_patch_size
    filters, shares = principal_components(model.patch_embed.proj.weight.detach(), patch, NUM_FILTERS)
    cards = []
    tiles = enlarged(filter_tiles(filters), _FILTER_SIDE).numpy()
    for shown, share in zip(tiles, shares.tolist(), strict=True):
        cards.append(card(picture(shown, "filter"), f"{share:.1%}"))
    return [note("The first principal components of the patch embedding's filters:"), gallery(cards)]


def _positions(model: ViT) -> list[Html]:
    grid = model.config.grid
    positions = input_positions(model)
    if positions is None or max(grid) > _LARGEST_GRID:
        return []
    pixels = position_mosaic(position_similarity(positions, grid))
    shown = picture(enlarged(pixels, _MOSAIC_SIDE).numpy(), "position embedding similarity", lossless=True)
    text = (
        "The position embeddings: for each patch, at its place, the cosine similarity to those of all "
        "patches, from -1 (black) to 1 (white):"
    )
    return [note(text), shown]
