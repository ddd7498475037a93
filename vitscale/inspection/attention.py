"""What the attention of a ViT looks at (paper, Figures 6, 7 right, 11 and 14; appendix D.8).

The weights are computed again from the inputs of each attention layer, beside the fused kernel
that the model itself uses, and layer by layer, since those of all layers may not fit in memory.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitscale.errors import ConfigError
from vitscale.models.layers import Attention, AxialAttention
from vitscale.models.model import Model
from vitscale.models.vit import ViT

Observe = Callable[[int, Float[Tensor, "B K N N"]], None]


def as_vit(model: Model) -> ViT:
    """The model, if it is a ViT. Raises ConfigError for one without patches and attention."""
    if not isinstance(model, ViT):
        raise ConfigError(
            f'a model of kind "{model.config.kind}" has no patch tokens with attention; give a ViT'
        )
    return model


@torch.no_grad()
def observe_attention(model: ViT, images: Float[Tensor, "B 3 H W"], observe: Observe) -> None:
    """Run the model on images, and call observe(layer, weights) for each layer from the first.

    weights: softmax(Q K^T / sqrt(d)) in fp32, of each head, with what relative positions add;
    rows are queries and sum to 1. The model runs in eval mode, and is then in the mode that it
    was in.
    """
    training = model.training
    model.eval()
    try:
        with observing(model, observe):
            model.features(images)
    finally:
        model.train(training)


@contextmanager
def observing(model: ViT, observe: Observe) -> Iterator[None]:
    """Within the block, what runs the model calls observe(layer, weights) for each layer."""
    handles = []
    for layer, block in enumerate(model.blocks):
        attention = block.get_submodule("attn")
        assert isinstance(attention, Attention)

        handles += _observe_layer(attention, functools.partial(observe, layer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_layer(attention: Attention, observe: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Hooks that call observe(weights) in the attention's forward pass."""
    if attention.relative is None:

        def hook(_: nn.Module, __: Any, qkv: Tensor) -> None:
            weights = _weights(qkv, attention.num_heads)
            observe(_of_all(weights, attention) if isinstance(attention, AxialAttention) else weights)

        return [attention.qkv.register_forward_hook(hook)]
    held: list[Tensor] = []

    def hold(_: nn.Module, __: Any, qkv: Tensor) -> None:
        held.append(qkv)

    def hook_of_bias(_: nn.Module, __: Any, bias: Tensor) -> None:
        observe(_weights(held.pop(), attention.num_heads, bias))

    return [
        attention.qkv.register_forward_hook(hold),
        attention.relative.register_forward_hook(hook_of_bias),
    ]


def _weights(
    qkv: Float[Tensor, "B N D3"], num_heads: int, bias: Float[Tensor, "B K N N"] | None = None
) -> Float[Tensor, "B K N N"]:
    query, key, _ = qkv.float().unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, K, N, d]
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return (logits if bias is None else logits + bias.float()).softmax(dim=-1)


def _of_all(weights: Float[Tensor, "L K a a"], attention: AxialAttention) -> Float[Tensor, "B K N N"]:
    """The weights of all pairs of patches from those of each line: 0 between two lines.

    L: the lines of all images, B times the grid's rows or its columns.
    """
    rows, cols = attention.grid
    patches = rows * cols
    places = torch.arange(patches, device=weights.device).view(rows, cols)
    lines = places if attention.axis == "row" else places.T  # [lines, a], the patches of each
    whole = weights.new_zeros(len(weights) // len(lines), weights.shape[1], patches, patches)
    queries, keys = lines[:, :, None], lines[:, None, :]
    whole[:, :, queries, keys] = weights.unflatten(0, (-1, len(lines))).transpose(1, 2)
    return whole


def attention_distance(
    weights: Float[Tensor, "B K N N"], grid: tuple[int, int], patch_size: int
) -> Float[Tensor, " K"]:
    """The mean distance in pixels from a query patch to those that it attends to, by head.

    The mean is over images and query patches, and weighted by attention; distances are those of
    patch centres. The paper does not say what becomes of the class token: here it is left out,
    as are registers, and the weights of each query are scaled to sum to 1 again. A query that
    gives the patches no weight at all does not count; a head without any other has NaN.
    """
    patches = grid[0] * grid[1]
    weights = weights[..., -patches:, -patches:]
    weights = weights / weights.sum(dim=-1, keepdim=True)  # NaN for a query without weight
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = patch_size * torch.stack([rows, cols], dim=-1).reshape(patches, 2).to(weights)  # [n, 2]
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")  # [n, n]
    return (weights * distances).sum(dim=-1).nanmean(dim=(0, 2))


class Rollout:
    """Attention rollout (Abnar and Zuidema 2020), fed with the layers from the first on.

    Per layer A = (mean over heads + identity) / 2, for the residual connection; the rollout is
    the product A_L ... A_1, whose rows sum to 1. The paper's appendix D.8 names the mean and
    the product, not the identity.
    """

    def __init__(self) -> None:
        self.product: Float[Tensor, "B N N"] | None = None

    def __call__(self, layer: int, weights: Float[Tensor, "B K N N"]) -> None:
        mean = weights.mean(dim=1)
        mixed = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        self.product = mixed if self.product is None else mixed @ self.product


def attention_maps(model: ViT, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
    """How much the representation attends to each patch, by rollout.

    Of a model with a class token: that token's row. Without one: the mean of the patches' rows.
    """
    rollout = Rollout()
    observe_attention(model, images, rollout)
    assert rollout.product is not None
    return mean_row(model, rollout.product)


def mean_row(model: ViT, product: Float[Tensor, "B N N"]) -> Float[Tensor, "B h w"]:
    """The part of a rollout that attention_maps shows."""
    grid = model.config.grid
    patches = grid[0] * grid[1]
    row = product[:, 0] if model.cls_token is not None else product[:, -patches:].mean(dim=1)
    return row[:, -patches:].unflatten(1, grid)
