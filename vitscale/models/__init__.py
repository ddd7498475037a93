"""Models by configuration ([model]).

To add a second kind: write its config, a dataclass with `kind: Literal["resnet"] = "resnet"`,
and its Model in a file of their own; then name the config in ModelConfig, as in
`ViTConfig | ResNetConfig`, and the class in MODELS. What counts or converts a ViT's tensors
(flops.py, transfer.py, names.py, vitscale/memory.py) then needs a case for it.
"""

import torch

from vitscale.models.model import Model
from vitscale.models.vit import ViT, ViTConfig

ModelConfig = ViTConfig  # [model]: later a union of the kinds, the first of which is the default
MODELS: dict[str, type[Model]] = {"vit": ViT}


def empty_model(config: ModelConfig) -> Model:
    """The model of a config without values or memory, on the meta device."""
    with torch.device("meta"):
        return MODELS[config.kind](config)


def build_model(config: ModelConfig, seed: int) -> Model:
    """The model of a config, initialised from `seed`, fp32 on the CPU."""
    model = MODELS[config.kind](config)
    model.init_weights(seed)
    return model
