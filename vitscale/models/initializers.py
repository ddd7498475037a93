"""Initial values of weights, as Flax's initialisers draw them.

Of the weight that they are given only the shape counts, [outputs, inputs, ...].
"""

import math

import torch
from torch import Tensor, nn


def xavier_uniform(weight: Tensor, fan_out: int, generator: torch.Generator) -> Tensor:
    """Uniform of variance 2 / (fan_in + fan_out); fan_in is the last axis."""
    limit = math.sqrt(6 / (weight.shape[-1] + fan_out))
    return torch.empty(weight.shape).uniform_(-limit, limit, generator=generator)


def normal(weight: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(weight.shape).normal_(0.0, std, generator=generator)


def lecun_normal(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Flax's default: a normal of variance 1 / fan_in, cut at two standard deviations.

    A unit normal cut there has a deviation of 0.8796, for which the division makes up.
    """
    std = math.sqrt(1 / math.prod(weight.shape[1:])) / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(weight.shape), 0.0, std, -2 * std, 2 * std, generator=generator)
