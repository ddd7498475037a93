"""The Vision Transformer of the paper (section 3.1), numerically equal to Google's code."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitscale.models.corruption import Corruption
from vitscale.models.initializers import lecun_normal, normal, xavier_uniform
from vitscale.models.layers import Attention, AxialAttention, Block, Fp32Linear, MapHead, PatchEmbed
from vitscale.models.model import Model, check_images
from vitscale.models.posemb import RelativeBias, sincos2d, table2d
from vitscale.models.vit_config import ViTConfig


class ViT(Model):
    """The Vision Transformer of a config. init_weights gives its parameters their values."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width, gelu, eps = config.resolved_width, config.gelu, config.norm_eps
        mlp_dim, heads = config.resolved_mlp_dim, config.resolved_num_heads
        self.patch_embed = self._make_patch_embed()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.pool == "token" else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if config.distilled else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        outputs = config.num_patch_outputs
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if outputs else None
        self._make_posemb()
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(self._make_attention(index), width, mlp_dim, config.dropout, gelu, eps)
            for index in range(config.resolved_depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attn_pool = MapHead(width, mlp_dim, heads, gelu, eps) if config.pool == "map" else None
        size = config.representation_size
        self.pre_logits = nn.Linear(width, size) if size else None
        self.head = Fp32Linear(size or width, config.num_classes) if config.num_classes else None
        has_dist_head = config.distilled and config.num_classes
        self.head_dist = Fp32Linear(width, config.num_classes) if has_dist_head else None
        self.patch_head = Fp32Linear(width, outputs) if outputs else None

    def _make_patch_embed(self) -> PatchEmbed:
        return PatchEmbed(self.config.resolved_patch_size, self.config.resolved_width)

    def _make_attention(self, index: int) -> Attention:
        """The attention of block `index`: axial ones take turns, rows first."""
        config = self.config
        width, heads = config.resolved_width, config.resolved_num_heads
        if config.attention == "axial":
            return AxialAttention(width, heads, config.grid, "column" if index % 2 else "row")
        relative = config.posemb == "relative"
        return Attention(width, heads, RelativeBias(math.prod(config.grid), width) if relative else None)

    def _make_posemb(self) -> None:
        config = self.config
        self.pos_embed = self.pos_embed_x = self.pos_embed_y = None
        width, (rows, cols) = config.resolved_width, config.grid
        layers = config.resolved_depth if config.posemb_at == "every_layer" else 1
        if config.posemb == "learned":
            self.pos_embed = nn.Parameter(torch.empty(layers, config.num_positions, width))
        elif config.posemb == "learned2d":
            self.pos_embed_x = nn.Parameter(torch.empty(layers, cols, width // 2))
            self.pos_embed_y = nn.Parameter(torch.empty(layers, rows, width // 2))
        elif config.posemb == "sincos2d":
            del self.pos_embed
            self.register_buffer("pos_embed", torch.empty(1, config.num_positions, width), persistent=False)

    def position_embeddings(self) -> Float[Tensor, "L N D"] | None:
        """What is added to the tokens: to the class token, if any, and to the patches.

        L is the depth with posemb_at "every_layer", and else 1. None if nothing is added:
        without position embeddings, and with relative ones.
        """
        if self.pos_embed_x is None or self.pos_embed_y is None:
            return self.pos_embed
        return self._after_no_position(table2d(self.pos_embed_x, self.pos_embed_y))

    def _after_no_position(self, table: Float[Tensor, "L n D"]) -> Float[Tensor, "L N D"]:
        """The positions of patches after 0 for the class and the distillation token, if any."""
        zeros = table.new_zeros(len(table), self.config.num_positions - table.shape[1], table.shape[2])
        return torch.cat([zeros, table], dim=1)

    def forward(
        self,
        images: Tensor,
        features_only: bool = False,
        tokens: bool = False,
        layers: Sequence[int] | None = None,
        kept: Float[Tensor, "L 2 B 1 1"] | None = None,
        corruption: Corruption | None = None,
        separate_heads: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """As Model.forward, with two more ways that objectives use.

        corruption: gives the outputs of the patch head for the corrupted patches,
            [B, k, num_patch_outputs].
        separate_heads: of a distilled model, gives the logits of the class token's head and of
            the distillation token's, [B, 2, num_classes], in place of their mean.
        """
        wanted = layers or ()
        check_images(images, self.config.image_size)
        if not all(0 <= index < len(self.blocks) for index in wanted):
            raise ValueError(f"layers are {list(wanted)}; this model has blocks 0 to {len(self.blocks) - 1}")
        x = self._embed(images, corruption)  # [B, N, D]
        positions = self._positions_by_layer()
        outputs: dict[int, Tensor] = {}
        last = len(self.blocks) - 1
        reads_patches = tokens or corruption is not None or last in wanted
        for index, block in enumerate(self.blocks):
            if positions is not None:
                x = x + positions[index]
            num_outputs = self._num_read() if index == last and not reads_patches else None
            x = block(x, None if kept is None else kept[index], num_outputs)
            if index in wanted:
                outputs[index] = self._patch_tokens(self.norm(x))
        x = self.norm(x)  # [B, M, D]; M = N, or what the heads read
        if corruption is not None:
            return self._predict(self._patch_tokens(x), corruption.corrupted)
        if separate_heads:
            return self._both_heads(x)
        out = self._patch_tokens(x) if tokens else self._represent(x, features_only)
        return out if layers is None else (out, [outputs[index] for index in wanted])

    def _num_read(self) -> int | None:
        """How many of the first tokens the heads read; None = all of them."""
        if self.cls_token is None:
            return None
        return 1 if self.dist_token is None else 2

    def _embed(
        self, images: Float[Tensor, "B 3 H W"], corruption: Corruption | None
    ) -> Float[Tensor, "B N D"]:
        """The tokens: class and distillation token and registers, if any, then the patches, row
        by row.
        """
        x = self.patch_embed(images)  # [B, n, D]
        if corruption is not None:
            x = self._corrupt(x, corruption.sources)
        for token in (self.dist_token, self.cls_token):
            if token is not None:
                x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
        positions = self.position_embeddings() if self.config.posemb_at == "input" else None
        if positions is not None:
            # A fixed table is a buffer, which DeepSpeed leaves in fp32.
            x = x + positions.to(x.dtype)
        x = self.drop(x)
        if self.reg_token is None:
            return x
        return self._with_registers(x, self.reg_token.expand(x.shape[0], -1, -1))

    def _positions_by_layer(self) -> Sequence[Float[Tensor, "N D"]] | None:
        """What is added to the tokens before each block; None if it was added to the input."""
        if self.config.posemb_at == "input":
            return None
        positions = self.position_embeddings()  # [L or 1, N, D]
        assert positions is not None, "the config has no other"
        if self.reg_token is not None:
            zeros = positions.new_zeros(len(positions), self.config.num_registers, positions.shape[2])
            positions = self._with_registers(positions, zeros)
        return positions.expand(len(self.blocks), -1, -1).unbind()

    def _with_registers(
        self, x: Float[Tensor, "B N D"], registers: Float[Tensor, "B R D"]
    ) -> Float[Tensor, "B M D"]:
        before, patches = x.tensor_split([self.config.num_positions - math.prod(self.config.grid)], dim=1)
        return torch.cat([before, registers, patches], dim=1)

    def _corrupt(self, x: Float[Tensor, "B n D"], sources: Int64[Tensor, "B n"]) -> Float[Tensor, "B n D"]:
        assert self.mask_token is not None, "the model has no patch head"
        num_patches = x.shape[1]
        masked = (sources == num_patches)[:, :, None]  # [B, n, 1]
        return torch.where(masked, self.mask_token, _rows_of(x, sources.clamp(max=num_patches - 1)))

    def _predict(self, x: Float[Tensor, "B n D"], corrupted: Int64[Tensor, "B k"]) -> Float[Tensor, "B k X"]:
        assert self.patch_head is not None, "the model has no patch head"
        return self.patch_head(_rows_of(x, corrupted))

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """As Google's code initialises (vision_transformer models_vit.py).

        Kernels are Xavier uniform and biases 0, except for:

            biases of MLPs        normal, deviation 1e-6
            patch embedding       LeCun normal
            learned positions     normal, deviation 0.02, also those of axes and of offsets
            class token           0
            distillation token    normal, deviation 0.02 (DeiT)
            registers             normal, deviation 1e-6 (timm, DINOv2)
            mask token            normal, deviation 0.02 (BERT's embeddings)
            heads                 kernel 0, bias config.head_bias
            patch head            0
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{name}.weight", xavier_uniform(module.weight, module.weight.shape[0], generator)
                yield f"{name}.bias", torch.zeros(module.bias.shape)
            elif isinstance(module, nn.LayerNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape)
                yield f"{name}.bias", torch.zeros(module.bias.shape)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("attn.qkv", "attn_pool.kv")):
                # In Flax q, k and v are layers of fan-out D each. As one matrix of fan-out 3 D
                # their limit would be too small.
                width = self.config.resolved_width
                yield f"{name}.weight", xavier_uniform(module.weight, width, generator)
            if isinstance(module, nn.Linear) and name.endswith((".fc1", ".fc2")):
                yield f"{name}.bias", normal(module.bias, 1e-6, generator)
        yield "patch_embed.proj.weight", lecun_normal(self.patch_embed.proj.weight, generator)
        for name, param in self.named_parameters():
            if name.startswith("pos_embed") or name.endswith(".attn.relative.embed"):
                yield name, normal(param, 0.02, generator)
        if self.cls_token is not None:
            yield "cls_token", torch.zeros(self.cls_token.shape)
        if self.reg_token is not None:
            yield "reg_token", normal(self.reg_token, 1e-6, generator)
        if self.attn_pool is not None:
            probe = self.attn_pool.probe
            yield "attn_pool.probe", xavier_uniform(probe, probe.shape[1], generator)
        if self.dist_token is not None:
            yield "dist_token", normal(self.dist_token, 0.02, generator)
        for name, head in {"head": self.head, "head_dist": self.head_dist}.items():
            if head is not None:
                yield f"{name}.weight", torch.zeros(head.weight.shape)
                yield f"{name}.bias", torch.full(head.bias.shape, self.config.head_bias)
        if self.mask_token is not None and self.patch_head is not None:
            yield "mask_token", normal(self.mask_token, 0.02, generator)
            yield "patch_head.weight", torch.zeros(self.patch_head.weight.shape)
            yield "patch_head.bias", torch.zeros(self.patch_head.bias.shape)

    @torch.no_grad()
    def init_buffers(self) -> None:
        if self.config.posemb == "sincos2d" and self.pos_embed is not None:
            table = sincos2d(self.config.grid, self.config.resolved_width)  # [1, n, D]
            self.pos_embed.copy_(self._after_no_position(table))

    def _represent(self, x: Float[Tensor, "B N D"], features_only: bool) -> Float[Tensor, "B X"]:
        """Features [B, D] or logits [B, C] of the tokens after the final norm."""
        if self.head_dist is not None and not features_only:
            return self._both_heads(x).mean(dim=1)
        x = self._pool(x)  # [B, D]
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return x if features_only or self.head is None else self.head(x)

    def _both_heads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 2 C"]:
        assert self.head is not None and self.head_dist is not None, "the model is not a distilled one"
        return torch.stack([self.head(x[:, 0]), self.head_dist(x[:, 1])], dim=1)

    def _patch_tokens(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B n D"]:
        return x[:, self.config.num_tokens - math.prod(self.config.grid) :]

    def _pool(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        if self.attn_pool is not None:
            return self.attn_pool(x)
        return x[:, 0] if self.cls_token is not None else self._patch_tokens(x).mean(dim=1)


def _rows_of(x: Float[Tensor, "B n D"], indices: Int64[Tensor, "B k"]) -> Float[Tensor, "B k D"]:
    """Some tokens of each image. On a GPU, gather's gradient would be summed in any order."""
    return x[torch.arange(len(x), device=x.device)[:, None], indices]
