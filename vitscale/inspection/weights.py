"""What the weights of the embedding layer show (paper, Figure 7, left and centre)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vitscale.models.vit import ViT


class Components(NamedTuple):
    """Principal components of filters, and the share of the variance that each explains."""

    filters: Float[Tensor, "K P P 3"]
    shares: Float[Tensor, " K"]


def reads_pixels(model: ViT) -> bool:
    """Whether the filters of the patch embedding are pictures: a hybrid's are of features."""
    return model.config.kind == "vit"


def principal_components(kernel: Float[Tensor, "D I"], patch_size: int, count: int = 28) -> Components:
    """The top principal components of a patch embedding's D filters, of I = 3 P^2 inputs.

    Each is centred over the filters and of unit length; its sign makes its largest value
    positive. There are at most min(D - 1, I) of them.
    """
    filters = kernel.double()
    centred = filters - filters.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    count = min(count, len(kernel) - 1, kernel.shape[1])
    top = directions[:count]  # [K, I]
    largest = top.gather(1, top.abs().argmax(dim=1, keepdim=True))
    top = (top * largest.sign()).unflatten(1, (3, patch_size, patch_size)).permute(0, 2, 3, 1)
    shares = lengths.square() / lengths.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Components(top.float(), shares[:count].float())


def input_positions(model: ViT) -> Float[Tensor, "N D"] | None:
    """The position embeddings of the first layer's tokens; None if none are added to them."""
    positions = model.position_embeddings()
    return None if positions is None else positions[0].detach().float().cpu()


def position_similarity(pos_embed: Float[Tensor, "N D"], grid: tuple[int, int]) -> Float[Tensor, "h w h w"]:
    """Cosine similarity of each patch's position embedding, [row, column], to that of all.

    pos_embed: of all tokens, the last h w of which are the patches'.
    """
    rows, cols = grid
    positions = normalize(pos_embed[-rows * cols :].double(), dim=1)
    return (positions @ positions.T).float().reshape(rows, cols, rows, cols)
