"""Position embeddings at another resolution, and what fine-tuning takes over."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import build_model, transfer
from vitscale.models.model import CommonConfig
from vitscale.models.names import DIALECTS_OF
from vitscale.models.posemb import resize_posemb, sincos2d
from vitscale.models.resnet import ResNetConfig
from vitscale.models.transfer import check_backbone, check_head, is_backbone, transferred
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.configs import check_expressible, unlike_google

TINY = ViTConfig(variant="Ti/4", width=32, depth=2, num_heads=4, mlp_dim=48, image_size=16, num_classes=5)


@pytest.mark.parametrize("new", [24, 10])
def test_resize_equals_googles_zoom(new: int) -> None:
    posemb = torch.randn(1, 1 + 14 * 14, 6, generator=torch.Generator().manual_seed(0))
    grid = posemb[0, 1:].reshape(14, 14, 6).numpy()
    expected = zoom(grid, (new / 14, new / 14, 1), order=1).reshape(-1, 6)
    resized = resize_posemb(posemb, (14, 14), (new, new))
    assert np.abs(resized[0, 1:].numpy() - expected).max() < 1e-5
    assert torch.equal(resized[:, 0], posemb[:, 0])


def test_resize_keeps_what_it_must_on_grids_of_any_shape() -> None:
    posemb = torch.randn(1, 1 + 3 * 5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resize_posemb(posemb, (3, 5), (3, 5)), posemb)
    grid = resize_posemb(posemb, (3, 5), (7, 4))[0, 1:].reshape(7, 4, 4)
    old = posemb[0, 1:].reshape(3, 5, 4)
    for row, col in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.allclose(grid[row, col], old[row, col], atol=1e-6)
    ramp = (torch.arange(3.0)[:, None] + 10 * torch.arange(5.0)[None]).reshape(1, 15, 1)
    wide = resize_posemb(ramp, (3, 5), (5, 9)).reshape(5, 9)
    assert torch.allclose(wide, torch.arange(5.0)[:, None] / 2 + 5 * torch.arange(9.0)[None], atol=1e-5)


def interpolation(old: int, new: int) -> np.ndarray:
    """The matrix of linear interpolation with aligned ends, [new, old]."""
    places = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)[None]))


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (2, 6)), ((2, 6), (4, 4)), ((4, 4), (8, 1)), ((3, 5), (5, 3))]
)
def test_resizing_is_linear_by_rows_and_by_columns(old: tuple[int, int], new: tuple[int, int]) -> None:
    posemb = torch.randn(1, 1 + old[0] * old[1], 6, generator=torch.Generator().manual_seed(2))
    grid = posemb[0, 1:].reshape(*old, 6).double().numpy()
    rows, columns = (interpolation(*pair) for pair in zip(old, new, strict=True))
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, grid).reshape(-1, 6)
    resized = resize_posemb(posemb, old, new)
    assert np.abs(resized[0, 1:].numpy() - expected).max() < 1e-6
    assert torch.equal(resized[:, 0], posemb[:, 0])


def test_sincos_is_big_visions() -> None:
    """posemb_sincos_2d(h, w, width), written out for one position."""
    row, col, width = 2, 1, 16
    omega = 1 / 10_000 ** (np.arange(4) / 3)
    expected = np.concatenate(
        [np.sin(col * omega), np.cos(col * omega), np.sin(row * omega), np.cos(row * omega)]
    )
    assert np.allclose(sincos2d((3, 5), width)[0, row * 5 + col].numpy(), expected, atol=1e-6)


def test_the_backbone_moves_to_another_resolution_and_the_head_does_not() -> None:
    source = build_model(ViTConfig(**{**vars(TINY), "representation_size": 8}), 1)
    torch.nn.init.ones_(source.head.weight)
    target = build_model(ViTConfig(**{**vars(TINY), "image_size": 24, "num_classes": 3}), 2)
    state = {
        name: transferred(name, tensor, source.config, target.config)
        for name, tensor in source.state_dict().items()
        if is_backbone(name)
    }
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert missing == ["head.weight", "head.bias"] and unexpected == []
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert target.pos_embed.shape == (1, 37, 32) and target.head.weight.abs().max() == 0


def test_the_backbone_moves_to_images_that_are_no_squares_and_back() -> None:
    square, wide = TINY, ViTConfig(**{**vars(TINY), "image_size": (8, 40)})
    check_backbone(square, wide)
    posemb = build_model(square, 1).pos_embed.detach()
    moved = transferred("pos_embed", posemb, square, wide)
    assert torch.equal(moved, resize_posemb(posemb, (4, 4), (2, 10)))
    back = transferred("pos_embed", moved, wide, square)
    assert back.shape == posemb.shape and not torch.equal(back, posemb)
    assert torch.equal(back, resize_posemb(moved, (2, 10), (4, 4)))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"depth": 3}, "depth"),
        ({"pool": "mean"}, "pool"),
        ({"gelu": "exact"}, "gelu"),
        ({"norm_eps": 1e-12}, "norm_eps"),
    ],
)
def test_another_backbone_is_refused_by_its_key(change: dict, key: str) -> None:
    check_backbone(TINY, TINY)
    with pytest.raises(ConfigError, match=rf"model.{key} is .* set model.{key} ="):
        check_backbone(TINY, ViTConfig(**{**vars(TINY), **change}))


@pytest.mark.parametrize("key", ["num_classes", "representation_size"])
def test_another_head_is_refused_by_its_key(key: str) -> None:
    check_head(TINY, dataclasses.replace(TINY, depth=3))
    with pytest.raises(ConfigError, match=rf"model.{key} is 77, but .* or set model.{key} = "):
        check_head(TINY, dataclasses.replace(TINY, **{key: 77}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """A kind that vitscale does not have, without patch tokens."""

    kind: str = "mixer"
    image_size: int = 224
    num_classes: int = 10
    resolved_width: int = 768


@pytest.mark.usefixtures("without_type_checks")
def test_another_kind_needs_no_key_of_a_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS_OF, "mixer", ("vitscale",))
    monkeypatch.setitem(transfer._SAME, "mixer", ("resolved_width",))
    assert all(isinstance(config(), CommonConfig) for config in (MixerConfig, ResNetConfig, ViTConfig))
    check_backbone(MixerConfig(), MixerConfig(num_classes=3))
    assert unlike_google(MixerConfig()) == []
    for dialect in ("timm", "transformers", "linen"):
        sentence = f"model.kind 'mixer' cannot be exported to {dialect}; use --format safetensors"
        with pytest.raises(CheckpointError, match=sentence):
            check_expressible(MixerConfig(), dialect)
