"""Evaluate a checkpoint: checkpoint -> plain nn.Module -> task -> numbers."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitscale.checkpoint.export import State, load_model, locate
from vitscale.checkpoint.load import on_main
from vitscale.data.transforms import normalize
from vitscale.evals.tasks import EvalConfig, open_task


class FrozenModel:
    """A module as the tasks want it (EvalModel): float32, no gradients, evaluation mode, one device."""

    def __init__(self, module: nn.Module, *, image_size: int, num_classes: int, device: torch.device) -> None:
        self.module = module.to(device).eval()
        self.image_size, self.num_classes, self.device = image_size, num_classes, device

    @torch.inference_mode()
    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.module.features(self._input(images)).float()  # type: ignore[operator]

    @torch.inference_mode()
    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        return self.module(self._input(images)).float()

    def _input(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return normalize(images.to(self.device), torch.float32)


def evaluate(
    checkpoint: str, name: str, config: EvalConfig, device: torch.device, state: State = "fp32"
) -> dict[str, Any]:
    """Run the task `name` on a run, step directory or export. Every rank calls it and gets the same.

    state: "ema" = with the average of the weights, as evaluations in training do where there is one.
    Returns {"checkpoint": ..., "step": ..., "results": {"top1": 0.52, ...}}, fractions of 1. Raises
    ConfigError or DataError for what the user can mend.
    """
    # A live run's newest checkpoint may change meanwhile: rank 0 decides once which one is meant.
    path, step = on_main(lambda: locate(checkpoint, state))
    module = load_model(path, state=state)
    model = FrozenModel(
        module, image_size=module.config.image_size, num_classes=module.config.num_classes, device=device
    )
    results = open_task(name, config, model.image_size).run(model)
    return {"checkpoint": checkpoint, "step": step, "results": results}
