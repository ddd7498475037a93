"""Models as the tasks see them: uint8 images in, float32 without gradients out."""

import torch
from torch import Tensor

from vitscale.evals.adapters import FrozenModel, LiveModel
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig


def test_the_frozen_model_normalises_and_keeps_dropout_off():
    config = ViTConfig(
        width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=4, image_size=8, num_classes=3, dropout=0.5
    )
    module = build_model(config, seed=0).train()
    model = FrozenModel(module, torch.device("cpu"))
    assert (model.image_size, model.num_classes) == (8, 3)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    features = model.features(images)
    assert torch.equal(features, model.features(images)) and not features.requires_grad
    torch.testing.assert_close(features, module.features(images / 127.5 - 1.0))
    assert model.logits(images).shape == (2, 3)


def test_a_live_model_normalises_and_gives_float32_without_gradients():
    layer = torch.nn.Linear(48, 5).to(torch.bfloat16)
    seen = []

    def forward(pixels: Tensor, *, features_only: bool) -> Tensor:
        seen.append((pixels, features_only))
        hidden = pixels.to(torch.bfloat16).flatten(1)
        return hidden if features_only else layer(hidden)

    model = LiveModel(forward, num_classes=5)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    logits, features = model.logits(images), model.features(images)
    assert [features_only for _, features_only in seen] == [False, True]
    assert seen[0][0].dtype == torch.float32
    torch.testing.assert_close(seen[0][0].cpu(), images / 127.5 - 1.0)
    assert logits.shape == (2, 5) and features.shape == (2, 48)
    assert logits.dtype == features.dtype == torch.float32 and not logits.requires_grad
