"""The Vision Transformer of the paper (section 3.1), numerically equal to Google's code."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, image_size, sides, written
from vitscale.models.corruption import Corruption
from vitscale.models.initializers import lecun_normal, normal, xavier_uniform
from vitscale.models.layers import Block, Fp32Linear, Gelu, MapHead, PatchEmbed
from vitscale.models.limits import MAX_IMAGE_SIZE, MAX_PATCHES, MAX_SIZE
from vitscale.models.model import Model, check_images
from vitscale.models.posemb import Grid, sincos2d


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes that the letter of a variant stands for."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


# B, L and H are the paper's (Table 1); the others are of vision_transformer configs/models.py
# and big_vision models/vit.py.
VARIANTS = {
    "mu": Variant(32, 1, 128, 2),
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "M": Variant(512, 12, 2048, 8),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer ([model] with kind = "vit").

    variant:              NAME/PATCH: a name of VARIANTS, and a patch's side in pixels
    width, depth, num_heads, mlp_dim, patch_size:
                          each overrides the variant's; 0 = the variant's
    image_size:           side of the square input in pixels, or [height, width]; multiples of
                          the patch size
    num_classes:          outputs of the head; 0 = no head
    pool:                 what represents the image: the class "token", the "mean" of the patch
                          tokens, or "map", multi-head attention pooling
    num_registers:        learned tokens without a position beside those of the image ("Vision
                          Transformers Need Registers"); pooling by mean leaves them out
    num_patch_outputs:    outputs of a head on patch tokens, for masked patch prediction; with
                          it comes a learned embedding of masked patches; 0 = neither
    representation_size:  width of the tanh layer before the head; 0 = none
    head_bias:            initial bias of the head; for a sigmoid loss about -ln(num_classes)
    dropout:              after the position embedding, each attention and each MLP layer
    drop_path:            the share of images whose attention, and whose MLP, the last block
                          leaves out in training; it rises evenly from 0 in the first block
    posemb:               "learned", or the fixed "sincos2d"
    gelu:                 "tanh", Google's approximation, or "exact"
    norm_eps:             epsilon of every LayerNorm
    """

    kind: Literal["vit"] = "vit"
    variant: str = "B/16"
    width: int = 0
    depth: int = 0
    num_heads: int = 0
    mlp_dim: int = 0
    patch_size: int = 0
    image_size: ImageSize = 224
    num_classes: int = 1000
    pool: Literal["token", "mean", "map"] = "token"
    num_registers: int = 0
    num_patch_outputs: int = 0
    representation_size: int = 0
    head_bias: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    posemb: Literal["learned", "sincos2d"] = "learned"
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6  # Flax's default, and so Google's; torch's 1e-5 is another model

    def __post_init__(self) -> None:
        self._check_variant()
        sizes = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "num_classes")
        for name in (*sizes, "num_registers", "num_patch_outputs", "representation_size"):
            if not 0 <= getattr(self, name) <= MAX_SIZE:
                raise ConfigError(f"model.{name} {getattr(self, name)} must lie in [0, {MAX_SIZE:,}]")
        self._check_image_size()
        width, heads = self.resolved_width, self.resolved_num_heads
        if width % heads:
            raise ConfigError(f"model.width {width} is not a multiple of model.num_heads {heads}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} {getattr(self, name)} must lie in [0, 1)")
        if not self.norm_eps > 0:
            raise ConfigError(f"model.norm_eps {self.norm_eps} must be above 0; Google's models have 1e-6")
        if self.posemb == "sincos2d" and (width % 4 or width < 8):
            raise ConfigError(
                f'model.posemb "sincos2d" needs a width that is a multiple of 4 from 8 on, not {width}'
            )

    def _check_variant(self) -> None:
        name, slash, patch = self.variant.partition("/")
        if name not in VARIANTS or not slash or not patch.isdigit() or int(patch) < 1:
            near = difflib.get_close_matches(name, VARIANTS, 1, cutoff=0.3)
            raise ConfigError(
                f'model.variant "{self.variant}" is not NAME/PATCH with a name of {", ".join(VARIANTS)}; '
                f'for example "{near[0] if near else "B"}/16"'
            )

    def _check_image_size(self) -> None:
        patch, height_width, size = self.resolved_patch_size, sides(self.image_size), written(self.image_size)
        if any(side < 1 or side % patch for side in height_width):
            near = written(image_size(*(max(1, round(side / patch)) * patch for side in height_width)))
            rule = "a multiple" if isinstance(self.image_size, int) else "two multiples"
            raise ConfigError(f"model.image_size {size} is not {rule} of the patch size {patch}; use {near}")
        if max(height_width) > MAX_IMAGE_SIZE or math.prod(self.grid) > MAX_PATCHES:
            raise ConfigError(
                f"model.image_size {size} must be at most {MAX_IMAGE_SIZE:,}, and make at most "
                f"{MAX_PATCHES:,} patches, not {math.prod(self.grid):,}"
            )

    @property
    def _variant(self) -> Variant:
        return VARIANTS[self.variant.partition("/")[0]]

    @property
    def resolved_width(self) -> int:
        return self.width or self._variant.width

    @property
    def resolved_depth(self) -> int:
        return self.depth or self._variant.depth

    @property
    def num_blocks(self) -> int:
        """Of every kind that the model has: a hybrid's stem has some of its own."""
        return self.resolved_depth

    @property
    def resolved_num_heads(self) -> int:
        return self.num_heads or self._variant.num_heads

    @property
    def resolved_mlp_dim(self) -> int:
        return self.mlp_dim or self._variant.mlp_dim

    @property
    def resolved_patch_size(self) -> int:
        return self.patch_size or int(self.variant.partition("/")[2])

    @property
    def patch_inputs(self) -> int:
        """Values that the patch embedding reads of a patch."""
        return 3 * self.resolved_patch_size**2

    @property
    def grid(self) -> Grid:
        """Patches per column and per row."""
        height, width = sides(self.image_size)
        return height // self.resolved_patch_size, width // self.resolved_patch_size

    @property
    def num_positions(self) -> int:
        """Patches, plus the class token where there is one."""
        return self.grid[0] * self.grid[1] + (self.pool == "token")

    @property
    def num_tokens(self) -> int:
        """All that the blocks see: also the registers."""
        return self.num_positions + self.num_registers


class ViT(Model):
    """The Vision Transformer of a config. init_weights gives its parameters their values."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width, gelu, eps = config.resolved_width, config.gelu, config.norm_eps
        mlp_dim, heads = config.resolved_mlp_dim, config.resolved_num_heads
        self.patch_embed = self._make_patch_embed()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.pool == "token" else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        outputs = config.num_patch_outputs
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if outputs else None
        if config.posemb == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, config.num_positions, width))
        else:
            self.register_buffer("pos_embed", torch.empty(1, config.num_positions, width), persistent=False)
        self.drop = nn.Dropout(config.dropout)
        depth = config.resolved_depth
        self.blocks = nn.ModuleList(
            Block(width, mlp_dim, heads, config.dropout, gelu, eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attn_pool = MapHead(width, mlp_dim, heads, gelu, eps) if config.pool == "map" else None
        size = config.representation_size
        self.pre_logits = nn.Linear(width, size) if size else None
        self.head = Fp32Linear(size or width, config.num_classes) if config.num_classes else None
        self.patch_head = Fp32Linear(width, outputs) if outputs else None

    def _make_patch_embed(self) -> PatchEmbed:
        return PatchEmbed(self.config.resolved_patch_size, self.config.resolved_width)

    def forward(
        self,
        images: Tensor,
        features_only: bool = False,
        tokens: bool = False,
        layers: Sequence[int] | None = None,
        kept: Float[Tensor, "L 2 B 1 1"] | None = None,
        corruption: Corruption | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """As Model.forward; with a corruption, the outputs of the patch head for the corrupted
        patches, [B, k, num_patch_outputs].
        """
        wanted = layers or ()
        check_images(images, self.config.image_size)
        if not all(0 <= index < len(self.blocks) for index in wanted):
            raise ValueError(f"layers are {list(wanted)}; this model has blocks 0 to {len(self.blocks) - 1}")
        x = self._embed(images, corruption)  # [B, N, D]
        outputs: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x) if kept is None else block(x, kept[index])
            if index in wanted:
                outputs[index] = self._patch_tokens(self.norm(x))
        x = self.norm(x)  # [B, N, D]
        if corruption is not None:
            return self._predict(self._patch_tokens(x), corruption.corrupted)
        out = self._patch_tokens(x) if tokens else self._represent(x, features_only)
        return out if layers is None else (out, [outputs[index] for index in wanted])

    def _embed(
        self, images: Float[Tensor, "B 3 H W"], corruption: Corruption | None
    ) -> Float[Tensor, "B N D"]:
        """The tokens: the class token, if any, the registers, and the patches, row by row."""
        x = self.patch_embed(images)  # [B, n, D]
        if corruption is not None:
            x = self._corrupt(x, corruption.sources)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        # A fixed table is a buffer, which DeepSpeed leaves in fp32.
        x = self.drop(x + self.pos_embed.to(x.dtype))
        if self.reg_token is None:
            return x
        before, patches = x.tensor_split([self.config.num_positions - math.prod(self.config.grid)], dim=1)
        return torch.cat([before, self.reg_token.expand(x.shape[0], -1, -1), patches], dim=1)

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
            learned positions     normal, deviation 0.02
            class token           0
            registers             normal, deviation 1e-6 (timm, DINOv2)
            mask token            normal, deviation 0.02 (BERT's embeddings)
            head                  kernel 0, bias config.head_bias
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
        if self.config.posemb == "learned":
            yield "pos_embed", normal(self.pos_embed, 0.02, generator)
        if self.cls_token is not None:
            yield "cls_token", torch.zeros(self.cls_token.shape)
        if self.reg_token is not None:
            yield "reg_token", normal(self.reg_token, 1e-6, generator)
        if self.attn_pool is not None:
            probe = self.attn_pool.probe
            yield "attn_pool.probe", xavier_uniform(probe, probe.shape[1], generator)
        if self.head is not None:
            yield "head.weight", torch.zeros(self.head.weight.shape)
            yield "head.bias", torch.full(self.head.bias.shape, self.config.head_bias)
        if self.mask_token is not None and self.patch_head is not None:
            yield "mask_token", normal(self.mask_token, 0.02, generator)
            yield "patch_head.weight", torch.zeros(self.patch_head.weight.shape)
            yield "patch_head.bias", torch.zeros(self.patch_head.bias.shape)

    @torch.no_grad()
    def init_buffers(self) -> None:
        if self.config.posemb == "sincos2d":
            table = sincos2d(self.config.grid, self.config.resolved_width)  # [1, n, D]
            # The class token, where there is one, gets no position.
            prefix = table.new_zeros(1, self.config.num_positions - table.shape[1], table.shape[2])
            self.pos_embed.copy_(torch.cat([prefix, table], dim=1))

    def _represent(self, x: Float[Tensor, "B N D"], features_only: bool) -> Float[Tensor, "B X"]:
        """Features [B, D] or logits [B, C] of the tokens after the final norm."""
        x = self._pool(x)  # [B, D]
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return x if features_only or self.head is None else self.head(x)

    def _patch_tokens(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B n D"]:
        return x[:, self.config.num_tokens - math.prod(self.config.grid) :]

    def _pool(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        if self.attn_pool is not None:
            return self.attn_pool(x)
        return x[:, 0] if self.cls_token is not None else self._patch_tokens(x).mean(dim=1)


def _rows_of(x: Float[Tensor, "B n D"], indices: Int64[Tensor, "B k"]) -> Float[Tensor, "B k D"]:
    """Some tokens of each image. On a GPU, gather's gradient would be summed in any order."""
    return x[torch.arange(len(x), device=x.device)[:, None], indices]
