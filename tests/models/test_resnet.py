"""BiT's ResNets: the published sizes, epsilons, padding and initialisation."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.ops import CountOps
from models.random_models import pixels, randomised
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize
from vitscale.memory import activation_bytes, count_params, head_bytes
from vitscale.models import build_model
from vitscale.models.flops import forward_macs, train_flops
from vitscale.models.resnet import ResNet, ResNetConfig
from vitscale.models.transfer import check_backbone
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels, layer_name

# Maps of 10 x 10, 10 x 10, 5 x 5 and 5 x 5: odd sides and both kinds of block.
TINY = ResNetConfig(width=32, stages=(1, 2), image_size=40, num_classes=5)


# In millions, with 1,000 classes: timm's results.csv, to all of its digits.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("R50x1", 25.55),
        ("R50x3", 217.32),
        ("R101x1", 44.54),
        ("R101x3", 387.93),
        ("R152x2", 236.34),
        ("R152x4", 936.53),
    ],
)
def test_parameter_counts_are_the_published_ones(variant: str, millions: float) -> None:
    assert round(count_params(ResNetConfig(variant=variant)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops"),
    [
        ("R50x1", 7, 50),
        ("R50x2", 7, 199),
        ("R101x1", 7, 96),
        ("R152x1", 7, 141),
        ("R152x2", 14, 1126),
        ("R200x3", 14, 3306),
    ],
)
def test_flops_are_3_to_4_percent_above_those_of_table_6(variant: str, epochs: int, exaflops: float) -> None:
    """For all alike; the paper does not say how it counts ResNets, and here each multiplication
    of a convolution counts, also with a padded zero.
    """
    total = train_flops(ResNetConfig(variant=variant)) * 303e6 * epochs / 1e18
    assert 1.03 <= total / exaflops <= 1.041


@pytest.mark.parametrize("size", [TINY.image_size, (32, 80)])
def test_macs_are_those_of_an_operator_count(size: ImageSize) -> None:
    config = dataclasses.replace(TINY, image_size=size)
    counts: dict[str, int] = {}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        counts[str(len(counts))] = output[0].numel() * module.weight[0].numel()

    model = build_model(config, 0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    model(pixels(config, 1))
    assert len(counts) == 1 + 3 * 3 + 2 and forward_macs(config) == sum(counts.values())


def reference_forward(model: ResNet, images: Tensor) -> Tensor:
    """The same model written another way: plain formulas, and windows by unfold."""
    state = dict(model.named_parameters())

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        w = state[f"{name}.weight"]
        flat = w.flatten(1)
        mean, var = flat.mean(1, keepdim=True), flat.var(1, unbiased=False, keepdim=True)
        w, k = ((flat - mean) / torch.sqrt(var + 1e-10)), w.shape[-1]
        sides = [(side + 2 * (k // 2) - k) // stride + 1 for side in x.shape[2:]]
        return (w @ F.unfold(x, k, padding=k // 2, stride=stride)).unflatten(2, sides)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    x = conv(images, "root", 2)
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2)
    padded[:, :, 1:-1, 1:-1] = x
    x = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    for index, stride in enumerate((1, 2, 1)):
        block = f"blocks.{index}"
        y = norm(x, f"{block}.norm1").relu()
        shortcut = conv(y, f"{block}.downsample", stride) if index < 2 else x
        y = norm(conv(y, f"{block}.conv1"), f"{block}.norm2").relu()
        y = norm(conv(y, f"{block}.conv2", stride), f"{block}.norm3").relu()
        x = conv(y, f"{block}.conv3") + shortcut
    return norm(x, "norm").relu().mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("size", [TINY.image_size, (13, 30)])
def test_the_forward_pass_equals_an_independent_one(size: ImageSize) -> None:
    config = dataclasses.replace(TINY, image_size=size)
    model = randomised(config)
    expected = reference_forward(model, pixels(config))
    torch.testing.assert_close(model(pixels(config)), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.3


@pytest.mark.parametrize(("images", "kernels"), [(1e-3, 1.0), (1.0, 1e-5)])
def test_both_epsilons_count_where_values_are_faint(images: float, kernels: float) -> None:
    """Variances of the size of the epsilons: another epsilon would give other logits."""
    model = randomised(TINY)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= kernels
    faint = images * pixels(TINY)
    torch.testing.assert_close(model(faint), reference_forward(model, faint), rtol=1e-4, atol=1e-5)


def test_the_pool_of_the_root_is_padded_with_zeros() -> None:
    """Where all values are negative, a border of zeros wins; padding of -inf would not."""
    model = build_model(TINY, 0).eval()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.root.register_forward_hook(lambda module, inputs, output: -1 - output.abs())
    model(pixels(TINY))
    assert (seen[0][:, :, 0] == 0).all() and (seen[0][:, :, :, 0] == 0).all()
    assert (seen[0][:, :, 1:, 1:] < 0).all()


def test_kernels_keep_their_direction_however_small_they_are() -> None:
    """A deviation of 1e-4 is far above the root of the epsilon, 1e-5, and one of 1e-6 below."""
    conv = build_model(TINY, 0).blocks[0].conv1
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    large = conv(x).detach()
    with torch.no_grad():
        conv.weight.sub_(conv.weight.mean(1, keepdim=True))
        conv.weight.mul_(1e-4 / conv.weight.std(1, correction=0, keepdim=True))
        assert torch.allclose(conv(x), large, rtol=0.01, atol=0.01)
        conv.weight.mul_(1e-2)
        ratio = float(conv(x).std() / large.std())
    assert ratio == pytest.approx(1e-6 / math.sqrt(1e-12 + 1e-10), rel=0.01)


def test_weights_are_initialised_as_the_source_does_and_the_seed_decides_all() -> None:
    config = dataclasses.replace(TINY, head_bias=-6.9)
    model, again = ResNet(config), build_model(config, 5)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(math.nan)
    model.init_weights(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    kernel = model.blocks[1].conv2.weight  # [64, 64, 3, 3]
    assert kernel.std().item() == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.02)
    assert all((block.norm3.weight == 1).all() and (block.norm3.bias == 0).all() for block in model.blocks)
    assert (model.head.weight == 0).all() and (model.head.bias == -6.9).all()
    assert model(pixels(config)).unique().tolist() == pytest.approx([-6.9])


def test_features_come_as_a_vector_or_place_by_place() -> None:
    model = randomised(TINY).eval()
    images = pixels(TINY)
    features, tokens = model.features(images), model.features(images, tokens=True)
    assert features.shape == (3, 256) and tokens.shape == (3, 25, 256)
    assert torch.allclose(tokens.mean(1), features, atol=1e-6)
    assert torch.allclose(features @ model.head.weight.T + model.head.bias, model(images), atol=1e-5)
    with pytest.raises(ValueError, match=r"layers are \[0\].* maps of different sizes.*; leave layers out"):
        model.features(images, layers=[0])
    with pytest.raises(ValueError, match="images of 40 x 32 pixels; this model takes 40 x 40"):
        model(images[..., :32])


def test_checkpointing_recomputes_all_of_a_block_or_what_is_cheap_and_changes_nothing() -> None:
    """A block's last convolution is not needed again: no gradient depends on its output.

    Nor on that of the projection, which comes first in a block, and so is computed again.
    """
    counts, grads = {}, []
    for mode in ("none", "selective", "full"):
        model = randomised(TINY).train()
        model.set_activation_checkpointing(mode)
        with CountOps() as ops:
            model(pixels(TINY)).square().sum().backward()
        counts[mode] = (ops.num["convolution"], ops.num["native_group_norm"])
        grads.append([param.grad for param in model.parameters()])
    convolutions, norms = counts["none"]
    assert (convolutions, norms) == (12, 10)
    assert counts["selective"] == (convolutions + 2, norms + 9)
    assert counts["full"] == (convolutions + 2 * 3 + 2, norms + 9)
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize(("precision", "size"), [("fp32", 64), ("bf16", 64), ("bf16", (32, 96))])
def test_activations_are_what_the_backward_pass_keeps(precision: str, size: ImageSize) -> None:
    """Counted as the bytes of the storages that autograd holds, beside weights and images."""
    config = ResNetConfig(variant="R26x1", image_size=size, num_classes=0)
    model, images = build_model(config, 0), pixels(config, 12)
    if precision == "bf16":
        model, images = model.bfloat16(), images.bfloat16()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), images)}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    measured, estimated = [], []
    for count in (4, 12):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images[:count]).sum()
        measured.append(sum(held.values()))
        estimated.append(activation_bytes(config, count, precision, "none"))
        loss.backward()
    assert estimated[0] == pytest.approx(measured[0], rel=0.03)
    # Of 8 images, without the kernels, which are most of the bytes of few.
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.03)


def test_recomputation_needs_less_and_the_head_counts_its_inputs() -> None:
    config = ResNetConfig(variant="R50x1")
    none, selective, full = (
        activation_bytes(config, 64, "bf16", mode) for mode in ("none", "selective", "full")
    )
    assert 0.5 < full / none < 0.55 < selective / none < 0.7
    assert head_bytes(config, 64) == 1_000 * (16 * 64 + 8 * 2048)


def test_weight_decay_is_of_convolutions_and_head_and_layers_are_blocks() -> None:
    model = build_model(TINY, 0)
    names = dict(model.named_parameters())
    decayed = {name for name, param in names.items() if param.dim() > 1}
    assert kernels(model) == decayed and len(decayed) == 13
    assert {layer_name(name) for name in names} == {"embeddings", "blocks.0", "blocks.1", "blocks.2", "head"}
    assert layer_name("root.weight") == "embeddings" and layer_name("norm.weight") == "head"


def test_only_the_same_backbone_can_be_fine_tuned() -> None:
    check_backbone(TINY, dataclasses.replace(TINY, image_size=64, num_classes=7, head_bias=-1.0))
    check_backbone(ResNetConfig(variant="R50x1"), ResNetConfig(width=64, stages=(3, 4, 6, 3)))
    with pytest.raises(ConfigError, match=r"model.stages is \[1, 1\].* has \[1, 2\]; set model.stages"):
        check_backbone(TINY, dataclasses.replace(TINY, stages=(1, 1)))
    with pytest.raises(ConfigError, match=r'kind is "resnet", but the .* has \"vit\"; set model.kind'):
        check_backbone(ViTConfig(), TINY)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "R34x1"}, r'model.variant "R34x1" is not R{DEPTH}x{FACTOR} .* for example "R50x1"'),
        ({"variant": "B/16"}, 'model.variant "B/16" is not R'),
        ({"variant": "R50x0"}, 'model.variant "R50x0" is not R'),
        ({"width": 48}, "model.width 48 must be a multiple of 32"),
        ({"stages": (1, 0)}, r"model.stages \[1, 0\] must be at most 8 numbers of blocks, each above 0"),
        ({"stages": (1,) * 9}, "must be at most 8 numbers"),
        ({"image_size": 0}, r"model.image_size 0 must lie in \[1, 65,536\]"),
        ({"num_classes": -1}, "model.num_classes -1 must lie in"),
    ],
)
def test_sizes_that_make_no_resnet_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResNetConfig(**keys)
