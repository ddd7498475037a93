"""A model's configuration as other libraries write it; what they cannot express is refused."""

import dataclasses
import math

from vitscale.errors import CheckpointError
from vitscale.image_size import sides, written
from vitscale.models import ModelConfig
from vitscale.models.hybrid import HybridConfig
from vitscale.models.names import DIALECTS_OF, FLAX_DIALECTS, Dialect
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import VARIANTS, ViTConfig
from vitscale.weights.files import Dtype

_ONLY_TOKEN = (("token",), "ViTForImageClassification reads the class token; use --format timm")
_NO_TANH_LAYER = "has no tanh layer before its head; use --format safetensors or npz"
_NO_REGISTERS = ((0,), "it would be another model there; use --format safetensors")
_NO_PATCH_HEAD = ((0,), "it has no mask token and no head on patches; export a model fine-tuned from it")
_NO_DISTILLATION = "has no distillation token; use --format timm or safetensors"
_NO_GOOGLE_DISTILLATION = ((False,), f"Google's ViT {_NO_DISTILLATION}")
_NO_MAP_HEAD = (("token", "mean"), "only big_vision has this head; use --dialect big_vision")
_NO_HYBRID_MAP_HEAD = (("token", "mean"), "Google's hybrids have no such head; use --format safetensors")
_NO_POSEMB = (("learned", "sincos2d"), "it knows no other position embeddings; use --format safetensors")
_NO_AXIS = (("global",), "it knows no axial attention; use --format safetensors")
_NO_PLACEMENT = (("input",), "it adds positions to the input alone; use --format safetensors")
# By dialect, the keys that it limits: the allowed values, and what to do about others.
_LIMITS: dict[Dialect, dict[str, tuple[tuple[object, ...], str]]] = {
    "timm": {
        "representation_size": ((0,), f"timm's VisionTransformer {_NO_TANH_LAYER}"),
        "norm_eps": ((1e-6,), "timm's config.json cannot say another than 1e-6; use --format transformers"),
    },
    "transformers": {
        "pool": _ONLY_TOKEN,
        "representation_size": ((0,), f"ViTForImageClassification {_NO_TANH_LAYER}"),
        "distilled": ((False,), f"ViTForImageClassification {_NO_DISTILLATION}"),
    },
    "original": {"pool": _NO_MAP_HEAD, "distilled": _NO_GOOGLE_DISTILLATION},
    "linen": {"pool": _NO_MAP_HEAD, "distilled": _NO_GOOGLE_DISTILLATION},
    "big_vision": {"distilled": _NO_GOOGLE_DISTILLATION},
}
# What Google's code computes; an .npz file does not say it.
GOOGLE_DEFAULTS = {"gelu": "tanh", "norm_eps": 1e-6}

# timm's architectures by (variant, patch size): all are one class; model_args says the rest.
# Those with a distillation token are of another class.
_TIMM_NAMES = {
    ("Ti", 16): "vit_tiny_patch16_224",
    ("S", 8): "vit_small_patch8_224",
    ("S", 16): "vit_small_patch16_224",
    ("S", 32): "vit_small_patch32_224",
    ("B", 8): "vit_base_patch8_224",
    ("B", 16): "vit_base_patch16_224",
    ("B", 32): "vit_base_patch32_224",
    ("L", 14): "vit_large_patch14_224",
    ("L", 16): "vit_large_patch16_224",
    ("L", 32): "vit_large_patch32_224",
    ("H", 14): "vit_huge_patch14_224",
    ("g", 14): "vit_giant_patch14_224",
    ("G", 14): "vit_gigantic_patch14_224",
}
_TIMM_DISTILLED_NAMES = {
    ("Ti", 16): "deit_tiny_distilled_patch16_224",
    ("S", 16): "deit_small_distilled_patch16_224",
    ("B", 16): "deit_base_distilled_patch16_224",
}
TIMM_POOLS = {"token": "token", "mean": "avg", "map": "map"}
_TIMM_GELUS = {"tanh": "gelu_tanh", "exact": "gelu"}
_TRANSFORMERS_GELUS = {"tanh": "gelu_pytorch_tanh", "exact": "gelu"}
_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_expressible(config: ModelConfig, dialect: Dialect) -> None:
    """Raise CheckpointError for the first key of the model that the dialect cannot express."""
    if isinstance(config, ResNetConfig) and dialect != "bit":
        raise CheckpointError(
            f"model.kind 'resnet' cannot be exported to {dialect}; use --format npz, which timm's "
            "resnetv2_*_bit read as checkpoint_path, or --format safetensors"
        )
    if isinstance(config, HybridConfig) and dialect not in ("original", "linen"):
        raise CheckpointError(
            f"model.kind 'hybrid' cannot be exported to {dialect}, which has no such model or one with other "
            "epsilons; use --format npz (of dialect original or linen), which timm reads, or safetensors"
        )
    if dialect not in DIALECTS_OF[config.kind]:
        raise CheckpointError(
            f"model.kind {config.kind!r} cannot be exported to {dialect}; use --format safetensors"
        )
    if not isinstance(config, ViTConfig):
        return
    if isinstance(config.image_size, tuple) and dialect in FLAX_DIALECTS:
        raise CheckpointError(
            f"model.image_size {written(config.image_size)} cannot be exported to {dialect}: Google's code "
            "takes positions for those of a square; use another --format"
        )
    limits = {
        "num_registers": _NO_REGISTERS,
        "num_patch_outputs": _NO_PATCH_HEAD,
        "attention": _NO_AXIS,
        "posemb": _NO_POSEMB,
        "posemb_at": _NO_PLACEMENT,
        **_LIMITS.get(dialect, {}),
    }
    if isinstance(config, HybridConfig):
        limits["pool"] = _NO_HYBRID_MAP_HEAD
    for key, (allowed, reason) in limits.items():
        value = getattr(config, key)
        if value not in allowed:
            raise CheckpointError(f"model.{key} {value!r} cannot be exported to {dialect}: {reason}")


def unlike_google(config: ModelConfig) -> list[str]:
    """The keys, as key = value, in which a model is not what readers of .npz files assume."""
    if not isinstance(config, ViTConfig):
        return []
    values = {key: getattr(config, key) for key in GOOGLE_DEFAULTS}
    return [f"model.{key} = {value!r}" for key, value in values.items() if value != GOOGLE_DEFAULTS[key]]


def timm_config(config: ViTConfig) -> dict[str, object]:
    """config.json for timm.create_model("local-dir:FOLDER", pretrained=True)."""
    size, width = config.image_size, config.resolved_width  # timm, too, takes (height, width)
    pool = TIMM_POOLS[config.pool]
    names = _TIMM_DISTILLED_NAMES if config.distilled else _TIMM_NAMES
    variant, patch = _variant_name(config), config.resolved_patch_size
    return {
        "architecture": names.get((variant, patch), names["B", 16]),
        "num_classes": config.num_classes,
        "num_features": width,
        "global_pool": pool,
        "model_args": {
            "img_size": size,
            "patch_size": patch,
            "embed_dim": width,
            "depth": config.resolved_depth,
            "num_heads": config.resolved_num_heads,
            "mlp_ratio": _mlp_ratio(width, config.resolved_mlp_dim),
            "global_pool": pool,
            "class_token": config.pool == "token",
            "fc_norm": False,  # mean pooling comes after the last norm, as in the paper's models
            "act_layer": _TIMM_GELUS[config.gelu],
        },
        "pretrained_cfg": {
            "num_classes": config.num_classes,
            "input_size": [3, *sides(size)],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled else "head",
        },
    }


def transformers_config(config: ViTConfig, dtype: Dtype) -> dict[str, object]:
    """config.json of transformers' ViTForImageClassification."""
    labels = {str(label): f"LABEL_{label}" for label in range(config.num_classes)}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": config.resolved_width,
        "num_hidden_layers": config.resolved_depth,
        "num_attention_heads": config.resolved_num_heads,
        "intermediate_size": config.resolved_mlp_dim,
        "hidden_act": _TRANSFORMERS_GELUS[config.gelu],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.resolved_patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {name: int(label) for label, name in labels.items()},
        "torch_dtype": _TORCH_DTYPES[dtype],
    }


def preprocessor_config(config: ViTConfig) -> dict[str, object]:
    """preprocessor_config.json of transformers: a resize, and pixels in [-1, 1]."""
    height, width = sides(config.image_size)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _variant_name(config: ViTConfig) -> str:
    """The variant of the model's sizes, however its config gives them; "" if there is none."""
    sizes = (
        config.resolved_width,
        config.resolved_depth,
        config.resolved_mlp_dim,
        config.resolved_num_heads,
    )
    return next((name for name, variant in VARIANTS.items() if dataclasses.astuple(variant) == sizes), "")


def _mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio for which timm's int(width * ratio) is mlp_dim: plain division may round down."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)
