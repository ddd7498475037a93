"""What a Vision Transformer is, as a config says it ([model] with kind = "vit")."""

import dataclasses
import difflib
import math
import re
from typing import Literal

from vitscale import toml
from vitscale.config import check_choices
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, image_size, sides, written
from vitscale.models.layers import Gelu
from vitscale.models.limits import MAX_IMAGE_SIZE, MAX_PATCHES, MAX_SIZE
from vitscale.models.posemb import Grid, Placement, Posemb, check_posemb

Pool = Literal["token", "mean", "map"]
Scope = Literal["global", "axial"]


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
    distilled:            whether there is a distillation token after the class token, with a
                          position and a head of its own (DeiT, arXiv 2012.12877); logits are
                          the mean of both heads, features those of the class token
    representation_size:  width of the tanh layer before the head; 0 = none
    head_bias:            initial bias of the head; for a sigmoid loss about -ln(num_classes)
    dropout:              after the position embedding, each attention and each MLP layer
    drop_path:            the share of images whose attention, and whose MLP, the last block
                          leaves out in training; it rises evenly from 0 in the first block. The
                          model itself leaves nothing out: vitscale's trainer passes
                          kept=drop_path.draw_kept(...) to forward, and so must any other loop
    attention:            what a patch attends to: "global", all tokens; or "axial" (paper,
                          appendix D.6), its row in one block and its column in the next, two
                          for each block of the variant. Only patches have a row and a column:
                          then there is no class token or register, nor "relative" positions
    posemb:               position embeddings (paper, appendix D.4): "learned", for each place
                          in raster order and for the class token; "learned2d", for each column
                          and each row, of half the width; "relative", for each difference of
                          two places in raster order, in the attention of every layer; the
                          fixed "sincos2d"; or "none". The class token has a position with
                          "learned" alone, and registers never have one
    posemb_at:            where learned ones are added: to the "input" of the first layer; to
                          that of "every_layer", which has its own; or "shared" by all layers
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
    pool: Pool = "token"
    num_registers: int = 0
    num_patch_outputs: int = 0
    distilled: bool = False
    representation_size: int = 0
    head_bias: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    attention: Scope = "global"
    posemb: Posemb = "learned"
    posemb_at: Placement = "input"
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6  # Flax's default, and so Google's; torch's 1e-5 is another model

    def __post_init__(self) -> None:
        check_choices(self)
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
        if self.attention == "axial":
            self._check_axial()
        if self.distilled and (self.pool != "token" or self.representation_size):
            key, value = ("pool", "token") if self.pool != "token" else ("representation_size", 0)
            raise ConfigError(
                "model.distilled = true has two linear heads, on the class token and on the distillation "
                f"token, so model.{key} {getattr(self, key)!r} must be {value!r}"
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"model.norm_eps {self.norm_eps} must be above 0; Google's models have 1e-6")
        check_posemb(self.posemb, self.posemb_at, width)

    def _check_variant(self) -> None:
        name, slash, patch = self.variant.partition("/")
        if name not in VARIANTS or not slash or not re.fullmatch("[0-9]{1,5}", patch) or int(patch) < 1:
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

    def _check_axial(self) -> None:
        for key, allowed, reason in (
            ("distilled", (False,), "a distillation token is in no row and no column"),
            ("pool", ("mean", "map"), "a class token is in no row and no column"),
            ("num_registers", (0,), "a register is in no row and no column"),
            ("posemb", ("learned", "learned2d", "sincos2d", "none"), "its offsets are between all patches"),
        ):
            if (value := getattr(self, key)) not in allowed:
                raise ConfigError(
                    f'model.attention = "axial" is refused with model.{key} = {toml.value(value)}: {reason}; '
                    f"use {toml.value(allowed[0])}"
                )
        if self.resolved_depth % 2:
            raise ConfigError(
                f'model.depth {self.depth} must be even with model.attention = "axial": blocks of rows and '
                f"of columns take turns; use {self.depth + 1}"
            )

    @property
    def _variant(self) -> Variant:
        return VARIANTS[self.variant.partition("/")[0]]

    @property
    def title(self) -> str:
        """The variant, as the paper calls it: "Axial-B/16" with axial attention."""
        return f"Axial-{self.variant}" if self.attention == "axial" else self.variant

    @property
    def resolved_width(self) -> int:
        return self.width or self._variant.width

    @property
    def resolved_depth(self) -> int:
        return self.depth or self._variant.depth * (2 if self.attention == "axial" else 1)

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
        """Patches, plus the class token and the distillation token where there are such."""
        return self.grid[0] * self.grid[1] + (self.pool == "token") + self.distilled

    @property
    def num_tokens(self) -> int:
        """All that the blocks see: also the registers."""
        return self.num_positions + self.num_registers
