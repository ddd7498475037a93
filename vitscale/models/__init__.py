"""Models by configuration ([model]).

To add a kind: write its config, a dataclass with `kind: Literal["resnet"] = "resnet"`, and its
Model in a file of their own; then name the config in ModelConfig and the class in MODELS. What
counts or converts a model's tensors (flops.py, transfer.py, names.py, vitscale/memory.py,
vitscale/weights/) then needs a case for it. Learning rates and norms by layer need the names of
parameters that vitscale.optim.optimizers reads: "blocks.0." before those of the first block,
one of its EMBEDDINGS before those below it.
"""

import torch

from vitscale.models.hybrid import Hybrid, HybridConfig
from vitscale.models.model import CommonConfig, Model
from vitscale.models.resnet import ResNet, ResNetConfig
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig

ModelConfig = ViTConfig | HybridConfig | ResNetConfig  # [model]: the first kind is the default
MODELS: dict[str, type[Model]] = {"vit": ViT, "hybrid": Hybrid, "resnet": ResNet}


def empty_model(config: CommonConfig) -> Model:
    """The model of a config without values or memory, on the meta device."""
    with torch.device("meta"):
        return MODELS[config.kind](config)


def build_model(config: ModelConfig, seed: int) -> Model:
    """The model of a config, initialised from `seed`, fp32 on the CPU."""
    model = MODELS[config.kind](config)
    model.init_weights(seed)
    return model
