"""What the newest checkpoint of a run has learned: its filters, positions and attention."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale.data.transforms import normalize
from vitscale.inspection.attention import attention_maps
from vitscale.inspection.images import lit
from vitscale.inspection.weights import position_similarity, principal_components, reads_pixels
from vitscale.models.vit import ViT
from vitscale.report.page.html import Html, element, joined, note
from vitscale.report.page.pictures import card, channels_last, gallery, picture

NUM_FILTERS = 14
_FILTER_SIDE = 48  # pixels of a filter on the page
_LARGEST_GRID = 16  # of positions: more do not fit
_GAP = 1  # pixels between the tiles of a mosaic
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
    for values, share in zip(filters, shares.tolist(), strict=True):
        pixels = 127.5 + 127.5 * values / values.abs().max()
        shown = _enlarged(pixels.round().to(torch.uint8), _FILTER_SIDE)
        cards.append(card(picture(shown, "filter"), f"{share:.1%}"))
    return [note("The first principal components of the patch embedding's filters:"), gallery(cards)]


def _positions(model: ViT) -> list[Html]:
    grid = model.config.grid
    if max(grid) > _LARGEST_GRID:
        return []
    pixels = mosaic(position_similarity(model.pos_embed[0].detach(), grid))
    shown = picture(_enlarged(pixels, _MOSAIC_SIDE), "position embedding similarity", lossless=True)
    text = (
        "The position embeddings: for each patch, at its place, the cosine similarity to those of all "
        "patches, from -1 (black) to 1 (white):"
    )
    return [note(text), shown]


def mosaic(similarity: Float[Tensor, "h w h w"]) -> UInt8[Tensor, "y x 3"]:
    """Tiles in rows and columns, in grey, with gaps of the middle grey between them."""
    rows, cols = similarity.shape[:2]
    tiles = F.pad(similarity, (0, _GAP, 0, _GAP))  # [h, w, h + 1, w + 1]
    grey = tiles.permute(0, 2, 1, 3).reshape(rows * (rows + _GAP), cols * (cols + _GAP))
    return (127.5 + 127.5 * grey).round().clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, 3)


def _enlarged(pixels: UInt8[Tensor, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    """Each pixel as a square, as large as the longest side allows."""
    factor = max(1, side // max(pixels.shape[:2]))
    return np.ascontiguousarray(
        pixels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1).numpy()
    )
