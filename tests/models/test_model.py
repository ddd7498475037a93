"""What every kind of model promises, and the table of kinds."""

import dataclasses
import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from vitscale.errors import ConfigError
from vitscale.models import MODELS, Model, ModelConfig, build_model
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig

TINY = ViTConfig(variant="mu/4", image_size=8, num_classes=3)


def test_every_kind_that_a_config_can_name_has_its_class() -> None:
    configs = get_args(ModelConfig) or (ModelConfig,)
    assert set(MODELS) == {config.kind for config in configs}
    assert type(build_model(TINY, 0)) is ViT


def test_a_model_that_leaves_something_out_cannot_be_built() -> None:
    class Headless(Model):
        def forward(self, images: Tensor, features_only: bool = False) -> Tensor:
            return images

    with pytest.raises(TypeError, match="abstract methods init_buffers, initial_values"):
        Headless(TINY)


def test_compiling_the_blocks_keeps_every_name() -> None:
    model = build_model(TINY, 0)
    names = list(model.state_dict())
    model.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(
    ("owner", "mode", "writers"),
    [
        (None, 0o700, ""),
        ("us", 0o755, ""),
        ("us", 0o775, "group"),
        ("us", 0o777, "others"),
        ("another", 0o700, "others"),
        ("another's link", 0o700, "others"),
    ],
)
def test_nothing_is_compiled_with_a_cache_that_other_users_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool, owner: str | None, mode: int, writers: str
) -> None:
    if owner not in (None, "us") and os.getuid() != 0:
        pytest.skip("only root makes what belongs to another user")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = Path(default_cache_dir())
    if chosen:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache := tmp_path / "my" / "cache"))
    if owner:
        made = tmp_path / "theirs" if owner == "another's link" else cache
        made.mkdir(parents=True)
        made.chmod(mode)
        if owner == "another":
            os.chown(made, 12345, 12345)
        elif made != cache:
            cache.parent.mkdir(exist_ok=True)
            cache.symlink_to(made)
            os.lchown(cache, 12345, 12345)
    model = build_model(TINY, 0)
    if writers == "others" or (writers and not chosen):
        with pytest.raises(ConfigError, match=f"{cache} on .* can be written by other users; remove it"):
            model.compile_blocks()
        assert all(block._compiled_call_impl is None for block in model.blocks)
    else:
        model.compile_blocks()
        assert cache.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("pool", ["token", "mean", "map"])
def test_features_are_given_by_patch_and_by_block(pool: str) -> None:
    model = build_model(dataclasses.replace(TINY, pool=pool, depth=3), 0).eval()
    images = torch.rand(2, 3, 8, 8)
    tokens, layers = model.features(images, tokens=True, layers=[2, 0])
    assert tokens.shape == (2, 4, 32) and torch.equal(tokens, model.features(images, tokens=True))
    assert torch.equal(layers[0], tokens), "the last block is followed by nothing but the final norm"
    outputs = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features, (first,) = model.features(images, layers=[0])
    assert torch.equal(first, model.norm(outputs[0])[:, int(pool == "token") :])
    assert torch.equal(first, layers[1]) and torch.equal(features, model.features(images))
    if pool == "mean":
        assert torch.allclose(tokens.mean(1), features, atol=1e-6)


def test_patch_tokens_come_row_by_row() -> None:
    """Without attention and positions, a token depends on its own patch alone."""
    model = build_model(dataclasses.replace(TINY, pool="mean"), 0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    images = torch.zeros(2, 3, 8, 8)
    images[1, :, :4, 4:] = 1.0  # the patch at the right of the first row
    black, spotted = model.features(images, tokens=True)
    assert [torch.equal(black[i], spotted[i]) for i in range(4)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            r"uint8; .* \[-1, 1\]: \(images.float\(\) - 127.5\) / 127.5",
        ),
        (
            torch.zeros(3, 8, 8),
            r"images are \[3, 8, 8\]; .* takes \[B, 3, 8, 8\]: images\[None\] makes a batch",
        ),
        (torch.zeros(2, 8, 8, 3), r"images are \[2, 8, 8, 3\]; this model takes \[B, 3, 8, 8\]$"),
        (torch.zeros(2, 3, 12, 8), "images of 12 x 8 pixels; this model takes 8 x 8"),
    ],
)
def test_images_of_other_kinds_are_refused_in_a_sentence(images: Tensor, message: str) -> None:
    model = build_model(TINY, 0)
    for call in (model, model.features):
        with pytest.raises(ValueError, match=message):
            call(images)


@pytest.mark.parametrize("layers", [[2], [-1], [0, 7]])
def test_blocks_that_a_model_does_not_have_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="this model has blocks 0 to 0"):
        build_model(TINY, 0).features(torch.zeros(1, 3, 8, 8), layers=layers)


def test_features_go_through_the_hooks_of_the_module() -> None:
    """Under ZeRO 3 hooks gather the parameters, so features() may not call forward() itself."""
    model, calls = build_model(TINY, 0), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    model.features(torch.zeros(1, 3, 8, 8))
    assert calls == [model]
