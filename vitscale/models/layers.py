"""The pieces of a Vision Transformer, named as timm names them."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vitscale.models.compiled import gelu as activation
from vitscale.models.compiled import linear
from vitscale.models.posemb import Grid, RelativeBias

Gelu = Literal["tanh", "exact"]
Checkpointing = Literal["none", "selective", "full"]
Axis = Literal["row", "column"]

# What selective checkpointing keeps: the outputs that are expensive to compute again.
_KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """What selective checkpointing does with an operation of the forward pass.

    A convolution to more channels than it reads would need more memory than its input does,
    which the backward pass needs anyway.
    """
    kept = operation in _KEPT_OPS
    if operation == torch.ops.aten.convolution.default:
        outputs, inputs = arguments[1].shape[:2]
        kept = outputs <= inputs
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_keep_expensive = functools.partial(create_selective_checkpoint_contexts, _policy)


def to_patches(images: Shaped[Tensor, "B C H W"], size: int) -> Shaped[Tensor, "B N X"]:
    """The values of each patch, row by row of the grid: by channel, then row, then column."""
    batch, channels, height, width = images.shape
    rows, cols = height // size, width // size
    patches = images.reshape(batch, channels, rows, size, cols, size)  # [B, C, h, P, w, P]
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, channels * size**2)


class RecomputedBlock(nn.Module):
    """A block of a model; each kind has its own `_forward`.

    checkpointing: what the backward pass recomputes of it. has_dropout: whether its forward
    pass draws random numbers.
    """

    checkpointing: Checkpointing = "none"
    has_dropout = False
    _forward: Callable[..., Tensor]

    def forward(self, x: Tensor, *others: Tensor | int | None) -> Tensor:
        # In here, not around the block, so that a compiled block holds its recomputation, too.
        if self.checkpointing == "none" or not self.training:
            return self._forward(x, *others)
        options: dict[str, Any] = {"context_fn": _keep_expensive} if self.checkpointing == "selective" else {}
        options["preserve_rng_state"] = self.has_dropout
        return checkpoint(self._forward, x, *others, use_reentrant=False, **options)


class PatchEmbed(nn.Module):
    """Patches to tokens, by a reshape and one matmul.

    The weight is the kernel of the usual strided convolution, flattened from [D, C, P, P].
    """

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return self.proj(to_patches(images, self.patch_size))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, and dropout after each (paper, appendix B.1)."""

    def __init__(self, width: int, mlp_dim: int, dropout: float, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)
        self.drop = nn.Dropout(dropout)
        self.approximate: Literal["tanh", "none"] = "tanh" if gelu == "tanh" else "none"

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = self.drop(activation(linear(x, self.fc1), self.approximate))  # [B, N, M]
        return self.drop(self.fc2(x))


class Attention(nn.Module):
    """Multi-head self-attention (paper, appendix A).

    qkv.weight holds the rows of q, then of k, then of v; within each, head by head.
    relative: what relative positions add to the logits. num_outputs: how many of the
    first tokens get an output; they attend to all tokens. None = every token does.
    """

    def __init__(self, width: int, num_heads: int, relative: RelativeBias | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative = relative
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"], num_outputs: int | None = None) -> Float[Tensor, "B M D"]:
        batch, tokens, width = x.shape
        head = (self.num_heads, width // self.num_heads)
        parts = linear(x, self.qkv).chunk(3, dim=-1)
        query, key, value = (part.reshape(batch, tokens, *head).transpose(1, 2) for part in parts)
        # each [B, K, N, D / K]
        bias = None if self.relative is None else self.relative(query)
        if num_outputs is not None:
            query, bias = query[:, :, :num_outputs], None if bias is None else bias[:, :, :num_outputs]
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class AxialAttention(Attention):
    """Self-attention within each row of the grid of patches, or each column (appendix D.6).

    Only patches have a row and a column, so there are no other tokens.
    """

    def __init__(self, width: int, num_heads: int, grid: Grid, axis: Axis) -> None:
        super().__init__(width, num_heads)
        self.grid, self.axis = grid, axis

    def forward(self, x: Float[Tensor, "B N D"], num_outputs: int | None = None) -> Float[Tensor, "B N D"]:
        assert num_outputs is None, "every patch is read"
        lines = self._by_axis(x.unflatten(1, self.grid))  # [B, lines, n, D]
        mixed = super().forward(lines.flatten(0, 1)).unflatten(0, lines.shape[:2])
        return self._by_axis(mixed).flatten(1, 2)

    def _by_axis(self, x: Float[Tensor, "B a b D"]) -> Float[Tensor, "B c d D"]:
        """Rows to lines and lines to rows, which are each other's inverse."""
        return x if self.axis == "row" else x.transpose(1, 2)


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever the precision of input and weights.

    In bf16 a logit near -10, where the head of a sigmoid loss starts, moves in steps of 0.06.
    """

    def forward(self, x: Float[Tensor, "*rest I"]) -> Float[Tensor, "*rest O"]:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class Block(RecomputedBlock):
    """Pre-norm encoder block (paper, equations 2 and 3).

    kept: what the outputs of attention and MLP are multiplied by for each image (drop_path.py).
    num_outputs: as in Attention.
    """

    def __init__(
        self, attention: Attention, width: int, mlp_dim: int, dropout: float, gelu: Gelu, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = attention
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_dim, dropout, gelu)
        self.has_dropout = dropout > 0

    def _forward(
        self,
        x: Float[Tensor, "B N D"],
        kept: Float[Tensor, "2 B 1 1"] | None = None,
        num_outputs: int | None = None,
    ) -> Float[Tensor, "B M D"]:
        mixed = self.drop(self.attn(self.norm1(x), num_outputs))
        if num_outputs is not None:
            x = x[:, :num_outputs]
        x = x + (mixed if kept is None else mixed * kept[0].to(mixed.dtype))
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if kept is None else mixed * kept[1].to(mixed.dtype))


class MapHead(nn.Module):
    """Multi-head attention pooling ("Scaling Vision Transformers"; big_vision models/vit.py).

    A learned probe, the one query, attends to all tokens; a residual MLP follows.
    """

    def __init__(self, width: int, mlp_dim: int, num_heads: int, gelu: Gelu, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_dim, 0.0, gelu)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        batch, tokens, width = x.shape
        head = (self.num_heads, width // self.num_heads)
        query = self.q(self.probe.expand(batch, 1, width)).reshape(batch, 1, *head).transpose(1, 2)
        key, value = self.kv(x).reshape(batch, tokens, 2, *head).permute(2, 0, 3, 1, 4)  # [B, K, N, D / K]
        pooled = F.scaled_dot_product_attention(query, key, value)  # [B, K, 1, D / K]
        pooled = self.proj(pooled.transpose(1, 2).reshape(batch, 1, width))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
