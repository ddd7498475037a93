"""A model that can be fine-tuned in a second."""

from pathlib import Path

import pytest

from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.export import export_metadata, write_export


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny model as it is before training."""
    config = ViTConfig(
        variant="Ti/4", width=16, depth=1, num_heads=2, mlp_dim=32, image_size=8, num_classes=5
    )
    tensors = {name: param.detach() for name, param in build_model(config, seed=0).named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_export(path, iter(tensors.items()), shapes, export_metadata(config, 0, "fp32"))
