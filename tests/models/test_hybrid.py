"""The paper's hybrids: the published sizes, padding, initialisation, and what a ViT gives them.

That their logits are Google's is shown in tests/weights/test_hybrid_files.py.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from models.ops import CountOps
from models.random_models import pixels, randomised
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize
from vitscale.memory import activation_bytes, count_params, head_bytes
from vitscale.models import build_model
from vitscale.models.flops import forward_macs, train_flops
from vitscale.models.hybrid import Hybrid, HybridConfig, SameStdConv2d, same_padding
from vitscale.models.transfer import check_backbone, is_backbone, transferred
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels, layer_name

# The stem's maps have sides of 16, 8, 8 and 4; patches are 2 x 2 places of the last one.
TINY = HybridConfig(
    variant="R+mu/16", stem_width=32, stem_stages=(1, 2), patch_size=16, image_size=32, num_classes=5
)


# In millions, with 1,000 classes: timm's results.csv, to all of its digits.
@pytest.mark.parametrize(
    ("variant", "size", "tokens", "millions"),
    [
        ("R50+B/16", 384, 24 * 24, 98.95),
        ("R50+L/32", 224, 7 * 7, 328.99),
        ("R26+S/32", 224, 7 * 7, 36.43),
        ("R+Ti/16", 224, 7 * 7, 6.34),  # 32 pixels to a patch, whatever its name
    ],
)
def test_parameters_and_tokens_are_the_published_ones(
    variant: str, size: int, tokens: int, millions: float
) -> None:
    config = HybridConfig(variant=variant, image_size=size)
    assert round(count_params(config) / 1e6, 2) == millions
    assert math.prod(config.grid) == tokens


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops", "tolerance"),
    [
        ("R50+B/32", 7, 106, 0.016),
        ("R50+B/16", 7, 274, 0.001),
        ("R50+L/32", 7, 246, 0.005),
        ("R50+L/16", 14, 1668, 0.001),
        ("R50+L/16", 7, 859, 0.03),  # the paper's two figures of this model do not fit together
    ],
)
def test_flops_are_those_of_table_6(variant: str, epochs: int, exaflops: float, tolerance: float) -> None:
    total = train_flops(HybridConfig(variant=variant)) * 303e6 * epochs / 1e18
    assert total == pytest.approx(exaflops, rel=tolerance)


@pytest.mark.parametrize("size", [TINY.image_size, (32, 80)])
def test_macs_are_those_of_an_operator_count(size: ImageSize) -> None:
    config = dataclasses.replace(TINY, image_size=size)
    counts: list[int] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        counts.append(output[0].numel() * module.weight[0].numel())

    model = build_model(config, 0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    model(pixels(config, 1))
    assert len(counts) == 1 + 3 * 3 + 2
    plain = ViTConfig(variant="mu/16", image_size=size, num_classes=5)
    embedding = (
        math.prod(config.grid) * 32
    )  # patches and width: here of 2 x 2 x 256 values each, there of 16 x 16 x 3
    expected = sum(counts) + forward_macs(plain) + embedding * (1024 - 768)
    assert forward_macs(config) == expected


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding"),
    [
        (224, 7, 2, (2, 3)),
        (225, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (56, 3, 1, (1, 1)),
        (56, 1, 2, (0, 0)),
    ],
)
def test_padding_is_tensorflows(side: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
    assert same_padding(side, kernel, stride) == padding


def test_a_stride_begins_at_the_first_place_of_an_even_side() -> None:
    """One output of a 3 x 3 kernel at stride 2 on a map of 2 x 2, by hand: all zeros but the
    kernel's centre, standardised, where torch's padding of 1 would read the place at 0, 0.
    """
    conv = SameStdConv2d(1, 1, 3, stride=2)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 1, 1] = 9.0  # mean 1; deviation sqrt(72 / 9) = 2.828427
    x = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    # Rows and columns 0 and 1 of the kernel meet the map: 8 x 5 - (1 + 2 + 3).
    assert conv(x).item() == pytest.approx((8 * 5 - 6) / (math.sqrt(8) + 1e-5), rel=1e-6)


def test_each_side_is_padded_by_itself() -> None:
    """A 3 x 3 kernel at stride 2 pads 4 rows by (0, 1) and 5 columns by (1, 1)."""
    conv = SameStdConv2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = conv.weight.flatten(1)
    weight = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, correction=0, keepdim=True) + 1e-5)
    padded = torch.zeros(1, 2, 5, 7)
    padded[:, :, :4, 1:6] = x
    expected = nn.functional.conv2d(padded, weight.reshape(conv.weight.shape), stride=2)
    torch.testing.assert_close(conv(x), expected)
    assert conv(x).shape == (1, 3, 2, 3)


def test_the_pool_reaches_over_the_end_alone_and_ignores_what_is_there() -> None:
    model = build_model(TINY, 0).eval()
    stem, seen = model.patch_embed.stem, []
    ramp = torch.arange(256.0).reshape(1, 1, 16, 16).expand(1, 32, 16, 16)
    stem.norm.register_forward_hook(lambda module, inputs, output: ramp)
    stem.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixels(TINY, 1))
    first_and_last = seen[0][0, 0, [0, 7], [0, 7]].tolist()
    assert seen[0].shape == (1, 32, 8, 8)
    assert first_and_last == [2 * 16 + 2, 15 * 16 + 15]  # of rows and columns 0 to 2, and 14 to 15


@pytest.mark.parametrize(("deviation", "expected"), [(1e-2, 0.999), (1e-5, 0.5), (1e-6, 1 / 11)])
def test_the_epsilon_is_added_to_the_deviation(deviation: float, expected: float) -> None:
    """With BiT's, below the root, a deviation of 1e-5 would give 0.707."""
    conv = SameStdConv2d(32, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(1, 32, 1, 1, generator=torch.Generator().manual_seed(0)))
        conv.weight.sub_(conv.weight.mean()).mul_(deviation / conv.weight.std(correction=0))
        standardised = conv(torch.eye(32).reshape(32, 32, 1, 1))
    assert standardised.std(correction=0).item() == pytest.approx(expected, rel=1e-3)


def test_a_kernel_of_equal_weights_has_a_gradient() -> None:
    conv = SameStdConv2d(2, 1, 1)
    nn.init.ones_(conv.weight)
    conv(torch.ones(1, 2, 1, 1)).sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_weights_are_initialised_as_the_source_does_and_the_seed_decides_all() -> None:
    config = dataclasses.replace(TINY, head_bias=-6.9)
    model, again = Hybrid(config), build_model(config, 5)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(math.nan)
    model.init_weights(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    stem, plain = model.patch_embed.stem, build_model(ViTConfig(variant="mu/16", image_size=32), 5)
    kernel = stem.blocks[1].conv2.weight  # [64, 64, 3, 3]
    assert kernel.std().item() == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.02)
    assert (stem.norm.weight == 1).all() and (stem.blocks[0].downsample_norm.weight == 1).all()
    assert all((block.norm3.weight == 0).all() and (block.norm1.weight == 1).all() for block in stem.blocks)
    proj = model.patch_embed.proj.weight
    assert proj.std().item() == pytest.approx(math.sqrt(1 / (2 * 2 * 256)), rel=0.02)
    ours, theirs = (m.blocks[0].mlp.fc1.weight.std().item() for m in (model, plain))
    assert ours == pytest.approx(theirs, rel=0.1)
    assert model(pixels(config)).unique().tolist() == pytest.approx([-6.9])


def test_what_follows_the_patches_is_a_vit() -> None:
    """Registers, pooling, drop path, layers and tokens are inherited."""
    config = dataclasses.replace(TINY, pool="map", num_registers=2, representation_size=7, posemb="sincos2d")
    model = randomised(config).eval()
    model.init_buffers()
    images = pixels(config)
    assert model(images).shape == (3, 5) and model.features(images).shape == (3, 7)
    tokens, layers = model.features(images, tokens=True, layers=[0])
    assert tokens.shape == layers[0].shape == (3, 4, 32)
    assert not torch.equal(model(images), model(images, kept=torch.zeros(1, 2, 3, 1, 1)))
    with pytest.raises(ValueError, match="images of 32 x 16 pixels; this model takes 32 x 32"):
        model(images[..., :16])


def test_checkpointing_recomputes_all_of_a_block_or_what_is_cheap_and_changes_nothing() -> None:
    """Of a block's convolutions, selective recomputation keeps those that do not widen the map:
    the first two. The third of 3 blocks, and 2 projections, are computed again.
    """
    counts, grads = {}, []
    for mode in ("none", "selective", "full"):
        model = randomised(TINY).train()
        model.set_activation_checkpointing(mode)
        with CountOps() as ops:
            model(pixels(TINY)).square().sum().backward()
        counts[mode] = (ops.num["convolution"], ops.num["native_group_norm"])
        grads.append([param.grad for param in model.parameters()])
    assert counts["none"] == (1 + 3 * 3 + 2, 1 + 3 * 3 + 2)
    assert counts["selective"][0] == 12 + 3 + 2 and counts["full"][0] == 12 + 9 + 2
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize(("precision", "size"), [("fp32", 64), ("bf16", 64), ("bf16", (32, 96))])
@pytest.mark.parametrize("variant", ["R26+mu/32", "R+mu/16"])
def test_activations_are_what_the_backward_pass_keeps(variant: str, precision: str, size: ImageSize) -> None:
    """Counted as the bytes of the storages that autograd holds, beside weights and images."""
    config = HybridConfig(variant=variant, image_size=size, num_classes=0)
    model, images = build_model(config, 0), pixels(config, 12)
    if precision == "bf16":
        model, images = model.bfloat16(), images.bfloat16()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), images)}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    measured, estimated = [], []
    for count in (4, 12):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images[:count]).sum()
        measured.append(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))
        estimated.append(activation_bytes(config, count, precision, "none"))
    assert estimated[0] == pytest.approx(measured[0], rel=0.03)
    # Of 8 images, without the kernels, which are most of the bytes of few.
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.03)


def test_recomputation_needs_less_and_the_head_counts_its_inputs() -> None:
    config = HybridConfig(variant="R50+B/16")
    none, selective, full = (
        activation_bytes(config, 64, "bf16", mode) for mode in ("none", "selective", "full")
    )
    assert 0.2 < full / none < 0.3 and 0.55 < selective / none < 0.65
    assert head_bytes(config, 64) == 1_000 * (16 * 64 + 8 * 768)


def test_weight_decay_is_of_kernels_and_the_stem_is_of_the_embeddings() -> None:
    model = build_model(TINY, 0)
    names = dict(model.named_parameters())
    assert {name for name in kernels(model) if "stem" in name} == {
        name for name, param in names.items() if "stem" in name and param.dim() > 1
    }
    assert len([name for name in kernels(model) if "stem" in name]) == 12
    assert {layer_name(name) for name in names if name.startswith("patch_embed.")} == {"embeddings"}


def test_fine_tuning_keeps_the_stem_resizes_the_positions_and_drops_the_head() -> None:
    source, target = TINY, dataclasses.replace(TINY, image_size=64, num_classes=7)
    check_backbone(source, target)
    check_backbone(HybridConfig(variant="R50+B/32"), HybridConfig(variant="R+B/16", stem_stages=(3, 4, 6, 3)))
    posemb = torch.randn(1, 5, 32)
    assert transferred("pos_embed", posemb, source, target).shape == (1, 17, 32)
    assert is_backbone("patch_embed.stem.root.weight") and not is_backbone("head.weight")
    with pytest.raises(
        ConfigError, match=r"model.stem_stages is \[1, 1\].* has \[1, 2\]; set model.stem_stages"
    ):
        check_backbone(TINY, dataclasses.replace(TINY, stem_stages=(1, 1)))
    with pytest.raises(ConfigError, match=r"model\.width is 64, but"):
        check_backbone(TINY, dataclasses.replace(TINY, width=64))
    with pytest.raises(ConfigError, match=r'kind is "hybrid", but the .* has \"vit\"; set model.kind'):
        check_backbone(ViTConfig(), TINY)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "B/16"}, r'model.variant "B/16" is not STEM\+NAME/NUMBER .* for example "R50\+B/16"'),
        ({"variant": "R50+B/8"}, r'model.variant "R50\+B/8" is not STEM'),
        ({"variant": "R50+X/16"}, r'model.variant "R50\+X/16" is not STEM'),
        ({"stem_width": 48}, "model.stem_width 48 must be a multiple of 32"),
        ({"stem_stages": (1, 0)}, r"model.stem_stages \[1, 0\] must be at most 8 numbers of blocks"),
        ({"patch_size": 8}, "model.patch_size 8 must be a multiple of 16, .* of the stem's map; use 16"),
        ({"image_size": 230}, "model.image_size 230 is not a multiple of the patch size 16; use 224"),
        ({"stem_stages": (1,) * 4}, "model.patch_size 16 must be a multiple of 32, .*; use 32"),
    ],
)
def test_sizes_that_make_no_hybrid_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HybridConfig(**keys)
