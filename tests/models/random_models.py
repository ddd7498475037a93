"""Models with random weights in every tensor, and images for them."""

from typing import Any

import torch
from torch import Tensor

from vitscale.image_size import sides
from vitscale.models import ModelConfig, build_model


def randomised(config: ModelConfig, seed: int = 0) -> Any:
    """A model of a config in which no parameter is 0, nor any two alike."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0.1, 0.3, generator=generator)
    return model


def pixels(config: ModelConfig, count: int = 3) -> Tensor:
    """Images in [-1, 1], [count, 3, H, W]."""
    return torch.rand(count, 3, *sides(config.image_size), generator=torch.Generator().manual_seed(1)) * 2 - 1
