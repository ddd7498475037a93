"""Models by configuration."""

from vitscale.models.vit import ModelConfig, ViT


def build_model(config: ModelConfig, seed: int) -> ViT:
    """The model of a config, initialised from `seed`, fp32 on the CPU."""
    model = ViT(config)
    model.init_weights(seed)
    return model
