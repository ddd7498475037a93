"""Models of ours and of other libraries with random weights, and timm without torchvision."""

import dataclasses
import importlib.machinery
import itertools
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscale import load_model, save_model
from vitscale.image_size import sides
from vitscale.models import ModelConfig, build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.foreign.convert import import_model

SIZES = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 80, "patch_size": 4, "image_size": 12}
TINY = ViTConfig(**SIZES, num_classes=5)
OUR_PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3}  # for timm's config.json


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with noise: no bias is 0, and no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            param.copy_(0.2 * torch.randn(param.shape, generator=generator) + is_scale)
    return model.eval()


def saved_model(path: Path, config: ModelConfig = TINY, seed: int = 0, step: int = 7) -> nn.Module:
    """A random model of ours, and its export at `path`."""
    model = build_model(config, seed=0)
    randomise(model, seed)
    save_model(model, path, step=step)
    return model


def images(config: ModelConfig, count: int = 3) -> Tensor:
    """Pixels in [-1, 1], [B, 3, H, W]."""
    return torch.rand(count, 3, *sides(config.image_size), generator=torch.Generator().manual_seed(9)) * 2 - 1


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(param, theirs.pop(name)) for name, param in a.named_parameters()) and not theirs


def resolved(config: ModelConfig) -> dict[str, object]:
    """A configuration with its sizes as numbers, whether it gives a variant or numbers."""
    sizes = {key: getattr(config, f"resolved_{key}") for key in SIZES if key != "image_size"}
    return dataclasses.asdict(dataclasses.replace(config, variant="B/16", **sizes))


@torch.no_grad()
def logits(model: nn.Module, config: ModelConfig) -> Tensor:
    return model(images(config))


@contextmanager
def _stub_torchvision() -> Iterator[None]:
    """Modules in the place of torchvision, which timm imports but no model needs."""

    class Stub(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__getattr__": None})

    class Mode(type):
        def __getattr__(cls, name: str) -> str:
            return name

    names = ["", ".transforms", ".transforms.functional", ".datasets", ".ops", ".ops.misc", ".models"]
    stubs = {f"torchvision{name}": Stub(f"torchvision{name}") for name in names}
    for name, stub in stubs.items():
        stub.__path__ = []
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    stubs["torchvision.transforms.functional"].InterpolationMode = Mode("InterpolationMode", (), {})
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def import_timm() -> Any:
    if "torchvision" in sys.modules or importlib.machinery.PathFinder.find_spec("torchvision"):
        import timm
    else:
        with _stub_torchvision():
            import timm
    return timm


def _same_windows(x: Tensor, kernel: int, stride: int, fill: float) -> Tensor:
    """Windows of TensorFlow's "SAME" padding, [B, C, h, w, kernel, kernel].

    Output place i reads the places i * stride ... i * stride + kernel - 1, less what is padded
    before.
    """
    side = x.shape[-1]
    total = max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
    padded = torch.full((*x.shape[:2], side + total, side + total), fill)
    start = total // 2
    padded[:, :, start : start + side, start : start + side] = x
    return padded.unfold(2, kernel, stride).unfold(3, kernel, stride)


def flax_stem(arrays: dict[str, Tensor], images: Tensor) -> Tensor:
    """The stem of Google's hybrids (vision_transformer models_vit.py, models_resnet.py)."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        w = arrays[f"{name}/kernel"]  # HWIO
        w = w - w.mean((0, 1, 2))
        w = w / (w.square().mean((0, 1, 2)).sqrt() + 1e-5)
        return torch.einsum("bihwpq,pqio->bohw", _same_windows(x, w.shape[0], stride, 0.0), w)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        var, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        return x * arrays[f"{name}/scale"][:, None, None] + arrays[f"{name}/bias"][:, None, None]

    x = norm(conv(images, "conv_root", 2), "gn_root").relu()
    x = _same_windows(x, 3, 2, -math.inf).amax((4, 5))
    for stage in itertools.takewhile(lambda n: f"block{n}/unit1/conv1/kernel" in arrays, itertools.count(1)):
        for unit in itertools.count(1):
            name, stride = f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1
            if f"{name}/conv1/kernel" not in arrays:
                break
            y = norm(conv(x, f"{name}/conv1"), f"{name}/gn1").relu()
            y = norm(conv(y, f"{name}/conv2", stride), f"{name}/gn2").relu()
            y = norm(conv(y, f"{name}/conv3"), f"{name}/gn3")
            if f"{name}/conv_proj/kernel" in arrays:
                x = norm(conv(x, f"{name}/conv_proj", stride), f"{name}/gn_proj")
            x = (x + y).relu()
    return x


def flax_logits(arrays: dict[str, Tensor], images: Tensor, pool: str) -> Tensor:
    """Google's model (vision_transformer models_vit.py, big_vision models/vit.py), on arrays of
    any dialect in its own layouts: images [B, 3, H, W] in, logits [B, C] out.
    """
    arrays = {name.removeprefix("params/"): value for name, value in arrays.items()}
    kernel = arrays["embedding/kernel"]  # HWIO
    size = kernel.shape[0]
    if "conv_root/kernel" in arrays:
        images = flax_stem(arrays, images)
    patches = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, h, w, P, P]
    x = torch.einsum("bihwpq,pqid->bhwd", patches, kernel).flatten(1, 2) + arrays["embedding/bias"]
    if "pos_embedding" in arrays:  # big_vision adds positions before the class token comes
        x = x + arrays["pos_embedding"]
    if "cls" in arrays:
        x = torch.cat([arrays["cls"].expand(len(x), -1, -1), x], dim=1)
    x = x + arrays.get("Transformer/posembed_input/pos_embedding", 0)
    depth = len({name.split("/")[1] for name in arrays if "/encoderblock_" in name})
    for i in range(depth):
        x = _flax_block(_below(arrays, f"Transformer/encoderblock_{i}/"), x)
    x = _flax_norm(_below(arrays, "Transformer/encoder_norm/"), x)
    x = {"token": x[:, 0], "mean": x.mean(1)}[pool] if pool != "map" else _flax_map(arrays, x)
    if "pre_logits/kernel" in arrays:
        x = torch.tanh(x @ arrays["pre_logits/kernel"] + arrays["pre_logits/bias"])
    return x @ arrays["head/kernel"] + arrays["head/bias"]


def _flax_block(arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    attention, first, second, mlp = (
        _below(arrays, next(name for name in arrays if name.startswith(kind)).split("/")[0] + "/")
        for kind in ("MultiHead", "LayerNorm_0", ("LayerNorm_1", "LayerNorm_2"), "MlpBlock")
    )
    y = _flax_norm(first, x)
    x = x + _flax_attention(attention, y, y)
    return x + _flax_mlp(mlp, _flax_norm(second, x))


def _flax_map(arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    head = _below(arrays, "MAPHead_0/")
    probe = head["probe"].expand(len(x), -1, -1)
    pooled = _flax_attention(_below(head, "MultiHeadDotProductAttention_0/"), probe, x)
    normed = _flax_norm(_below(head, "LayerNorm_0/"), pooled)
    return (pooled + _flax_mlp(_below(head, "MlpBlock_0/"), normed))[:, 0]


def _flax_attention(arrays: dict[str, Tensor], queries: Tensor, x: Tensor) -> Tensor:
    query, key, value = (
        torch.einsum("bnd,dkh->bnkh", source, arrays[f"{part}/kernel"]) + arrays[f"{part}/bias"]
        for part, source in (("query", queries), ("key", x), ("value", x))
    )
    weights = (torch.einsum("bqkh,bnkh->bkqn", query, key) / query.shape[-1] ** 0.5).softmax(-1)
    mixed = torch.einsum("bkqn,bnkh->bqkh", weights, value)
    return torch.einsum("bqkh,khd->bqd", mixed, arrays["out/kernel"]) + arrays["out/bias"]


def _flax_mlp(arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x @ arrays["Dense_0/kernel"] + arrays["Dense_0/bias"]
    x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x @ arrays["Dense_1/kernel"] + arrays["Dense_1/bias"]


def _flax_norm(arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * arrays["scale"] + arrays["bias"]


def _below(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


Arrays = dict[str, np.ndarray]


def arrays_of(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)


def imported(folder: Path, arrays: Arrays, *overrides: str) -> Any:
    """The model of a file with these arrays and, as in Google's, no metadata of vitscale."""
    np.savez(folder / "google.npz", **arrays)
    return load_model(
        import_model(folder / "google.npz", folder / "back.safetensors", format="npz", overrides=overrides)
    )
