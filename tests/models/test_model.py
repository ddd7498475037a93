"""What every kind of model promises, and the table of kinds."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from vitscale.models import MODELS, Model, ModelConfig, build_model
from vitscale.models.vit import ViT, ViTConfig

TINY = ViTConfig(variant="mu/4", image_size=8, num_classes=3)


def test_every_kind_that_a_config_can_name_has_its_class() -> None:
    configs = get_args(ModelConfig) or (ModelConfig,)
    assert set(MODELS) == {config.kind for config in configs}
    assert type(build_model(TINY, 0)) is ViT


def test_a_model_that_leaves_something_out_cannot_be_built() -> None:
    class Headless(Model):
        def forward(self, images: Tensor, features_only: bool = False) -> Tensor:
            return images

    with pytest.raises(TypeError, match=r"abstract methods.* compile_blocks, init_buffers, init_weights"):
        Headless(TINY)


def test_compiling_the_blocks_keeps_every_name() -> None:
    model = build_model(TINY, 0)
    names = list(model.state_dict())
    model.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert list(model.state_dict()) == names


def test_features_go_through_the_hooks_of_the_module() -> None:
    """Under ZeRO 3 hooks gather the parameters, so features() may not call forward() itself."""
    model, calls = build_model(TINY, 0), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    model.features(torch.zeros(1, 3, 8, 8))
    assert calls == [model]
