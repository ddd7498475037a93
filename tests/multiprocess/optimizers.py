"""The optimizers of a run in plain PyTorch, parameter by parameter, in the simplest form."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitscale.optim.optimizers import OptimConfig, build_optimizer, parameter_groups


def plain_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Torch's own AdamW and SGD as vitscale makes them, and references of the two others."""
    if config.name == "adafactor":
        return PlainAdafactor(config, model)
    if config.name == "muon":
        return PlainMuon(config, model)
    return build_optimizer(config, model)


class Plain(torch.optim.Optimizer, abc.ABC):
    """Decoupled weight decay, and the rate times update(...), for every trained parameter."""

    def __init__(self, config: OptimConfig, model: nn.Module) -> None:
        self.config = config
        self.names = {id(param): name for name, param in model.named_parameters()}
        super().__init__(parameter_groups(model, config.weight_decay, config.layer_decay), {"lr": config.lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                name, state = self.names[id(param)], self.state[param]
                state["step"] = state.get("step", 0) + 1
                update = self.update(name, param.grad, state)
                param *= 1 - group["lr"] * group["weight_decay"]
                param -= group["lr"] * update

    @abc.abstractmethod
    def update(self, name: str, gradient: Tensor, state: dict) -> Tensor:
        """What is subtracted of a parameter at a rate of 1. state: its own, kept."""


class PlainAdafactor(Plain):
    def update(self, name: str, gradient: Tensor, state: dict) -> Tensor:
        beta2 = min(self.config.betas[1], 1 - state["step"] ** -0.8)
        scaled = []
        for index, matrix in enumerate(split(name, gradient.double())):  # 1e-30^2 is 0 in fp32
            squares, matrix_state = matrix.square() + 1e-30, state.setdefault(index, {})
            if matrix.ndim > 1 and min(matrix.shape) >= 32:
                row = average(matrix_state, "row", squares.mean(dim=1, keepdim=True), beta2)
                column = average(matrix_state, "column", squares.mean(dim=0, keepdim=True), beta2)
                second = row @ column / row.mean()
            else:
                second = average(matrix_state, "all", squares, beta2)
            scaled.append(matrix / second.sqrt())
        moment = state.get("moment", torch.zeros_like(gradient)).float()
        update = torch.cat(scaled).view_as(moment).float()
        moment = self.config.momentum * moment + (1 - self.config.momentum) * update
        state["moment"] = moment.bfloat16()
        return moment


class PlainMuon(Plain):
    def update(self, name: str, gradient: Tensor, state: dict) -> Tensor:
        config, step = self.config, state["step"]
        if name.startswith("blocks.") and gradient.ndim > 1:
            mu = config.momentum
            momentum = average(state, "momentum", gradient, mu, start=0.0)
            nesterov = (1 - mu) * gradient + mu * momentum
            return torch.cat([orthogonal(matrix) for matrix in split(name, nesterov)])
        first = average(state, "first", gradient, config.betas[0], start=0.0)
        second = average(state, "second", gradient.square(), config.betas[1], start=0.0)
        root = (second / (1 - config.betas[1] ** step)).sqrt() + config.eps
        return first / (1 - config.betas[0] ** step) / root


def orthogonal(matrix: Tensor) -> Tensor:
    """Muon's update of a matrix by its singular values, without Newton and Schulz."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (0.2 * max(matrix.shape) ** 0.5 * left @ torch.diag(values) @ right).float()


def split(name: str, tensor: Tensor) -> Sequence[Tensor]:
    if name.endswith("attn.qkv.weight"):
        return tensor.chunk(3)
    return [tensor.squeeze()] if tensor.ndim > 1 else [tensor]


def average(state: dict, key: str, value: Tensor, beta: float, start: float | None = None) -> Tensor:
    """Update a moving average, which starts at its first value, or at `start`."""
    before = state.get(key, value if start is None else torch.full_like(value, start))
    state[key] = beta * before + (1 - beta) * value
    return state[key]
