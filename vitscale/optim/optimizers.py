"""The paper's optimizers, AdamW with decay on kernels and SGD for fine-tuning, and two more.

Adafactor is what "Scaling Vision Transformers" trains with; Muon is newer. Both need whole
matrices (slices.py).
"""

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vitscale.config import check_choices, infinite_as_zero, positive
from vitscale.errors import ConfigError
from vitscale.optim.adafactor import Adafactor
from vitscale.optim.muon import MATRICES, Muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer ([optim]).

    name:          "adamw", "sgd", "adafactor" (half of AdamW's memory, at any ZeRO stage), or
                   "muon" (at ZeRO 1 and 2; AdamW for all but the kernels of the blocks)
    lr:            the peak rate, which [schedule] multiplies; Adafactor and Muon take AdamW's
    betas, eps:    of AdamW; the second of betas is also the most that Adafactor's grows to
    momentum:      of SGD, Adafactor and Muon; with Muon, 0.95 is usual
    weight_decay:  decoupled, times the learning rate, on kernels only; 0 with SGD
    clip_norm:     largest global gradient norm; 0 = no clipping
    layer_decay:   what the learning rate of each layer is of that of the layer above it, in
                   (0, 1]: the embeddings (a ResNet's root) are the lowest layer, norm and head
                   the highest, with the whole rate
    freeze:        names of parameters to leave untrained ("patch_embed.*", "blocks.[0-3].*")
    ema_decay:     of the exponential moving average of the weights, with which evaluations
                   then run (paper, section 4.1: 0.9999); 0 = none
    """

    name: Literal["adamw", "sgd", "adafactor", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        positive("optim", lr=self.lr, eps=self.eps)
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ConfigError(
                f"optim.betas {list(self.betas)} and optim.momentum {self.momentum} must lie in [0, 1)"
            )
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ConfigError(
                f"optim.weight_decay {self.weight_decay} and optim.clip_norm {self.clip_norm} "
                "must not be negative; 0 turns each off"
            )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"optim.layer_decay {self.layer_decay} must lie in (0, 1]; 0.65 to 0.8 is usual, 1 is none"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"optim.ema_decay {self.ema_decay} must lie in [0, 1); 0.9999 is usual, 0 is none"
            )
        if self.name == "sgd" and self.weight_decay:
            raise ConfigError(
                'optim.weight_decay must be 0 with optim.name = "sgd": the paper fine-tunes without decay'
            )

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return infinite_as_zero(values, ["clip_norm"])


# How the names of a model's embeddings begin; a ResNet's is its root.
EMBEDDINGS = ("patch_embed.", "cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "root.")


def kernels(model: nn.Module) -> set[str]:
    """What weight decay applies to: the weights of linear layers and convolutions, which are
    big_vision's */kernel.

    Biases, norms, tokens and position embeddings are left out. The kind of layer says it, not
    the shape: under ZeRO 3 a parameter's own shape is empty.
    """
    layers = (nn.Linear, nn.Conv2d)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match a pattern from training.

    Raises ConfigError for a pattern that matches no name, and if nothing is left to train.
    """
    params = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(params, pattern)
        if not names:
            raise ConfigError(
                f"optim.freeze {pattern!r} matches no parameter; "
                f"they are named like {', '.join(list(params)[:3])}"
            )
        for name in names:
            params[name].requires_grad_(False)
    if not any(param.requires_grad for param in params.values()):
        raise ConfigError(f"optim.freeze {list(patterns)} leaves nothing to train; remove a pattern")


def layer_of(name: str) -> int | None:
    """The layer of a parameter: 0 = embeddings, i + 1 = block i, None = above all blocks."""
    if name.startswith(EMBEDDINGS):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else None


def layer_name(name: str) -> str:
    """What the layer of a parameter is called in metrics: "embeddings", "blocks.3", "head"."""
    layer = layer_of(name)
    return "head" if layer is None else f"blocks.{layer - 1}" if layer else "embeddings"


def block_kernels(model: nn.Module) -> set[str]:
    """What Muon makes orthogonal: kernels of the blocks, not of the embedding or the head."""
    return {name for name in kernels(model) if name.startswith("blocks.")}


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, matrices: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The trained parameters in groups "decay" and "no_decay", and with layer_decay by layer.

    matrices: names of kernels that are in groups "matrices" of their own, for Muon, which keeps
    no second moment of them.

    A group's lr_share is its share of the learning rate: layer_decay to the power of the number
    of layers above it (BEiT, MAE). An empty group is left out.
    """
    named, decayed = dict(model.named_parameters()), kernels(model)
    layers = {name: layer_of(name) for name in named}
    top = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for decays in (True, False):
        for name, param in named.items():
            if not param.requires_grad or (name in decayed) != decays:
                continue
            layer = layers[name]
            share = layer_decay ** (0 if layer is None else top - layer)
            group = groups.setdefault(
                (decays, name in matrices, share),
                {
                    "name": "decay" if decays else "no_decay",
                    "params": [],
                    "weight_decay": weight_decay if decays else 0.0,
                    "lr_share": share,
                },
            )
            if name in matrices:
                group |= {"name": MATRICES, "slots": ("exp_avg",)}
            group["params"].append(param)
    return list(groups.values())


def build_optimizer(
    config: OptimConfig, model: nn.Module, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The torch optimizer over the parameter groups; the rate is set before every step.

    dtype: of the run's matmuls. Adafactor and Muon wait for Sliced.place, which the engine
    calls.

    Torch's are fused: one pass over memory instead of about ten, also on the CPU.
    """
    matrices = block_kernels(model) if config.name == "muon" else ()
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, matrices)
    if config.name == "sgd":
        # With momentum 0 torch keeps no buffer, and checkpoints need one. So small a momentum
        # adds nothing to a gradient.
        momentum = config.momentum or 1e-20
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, fused=True)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, momentum=config.momentum, decay_limit=config.betas[1])
    if config.name == "muon":
        return Muon(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            momentum=config.momentum,
            # fp16 would overflow: the matrices have the size of gradients.
            dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
