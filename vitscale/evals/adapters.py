"""Models as the tasks want them (EvalModel): a frozen one, and one in training."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale import distributed
from vitscale.data.transforms import normalize
from vitscale.evals.store import FeatureStore
from vitscale.models import Model


class FrozenModel:
    """A module in evaluation mode on one device, in float32, without gradients.

    It is for one set of weights: `stored` keeps the features of each data set, so after a step
    of training the module needs another FrozenModel.
    """

    def __init__(self, module: Model, device: torch.device, stored: FeatureStore | None = None) -> None:
        """Takes the module over: it moves to the device and leaves training mode.

        stored: the features that are known; None = none.
        """
        self._module, self._device = module.to(device).eval(), device
        self.stored = stored or FeatureStore()
        self.image_size, self.num_classes = module.config.image_size, module.config.num_classes

    @torch.inference_mode()
    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self._module.features(self._pixels(images)).float()

    @torch.inference_mode()
    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        return self._module(self._pixels(images)).float()

    def _pixels(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return normalize(images.to(self._device, non_blocking=True), torch.float32)


@runtime_checkable
class Forward(Protocol):
    """A forward pass: pixels in [-1, 1] to logits [B, C], or to features [B, D]."""

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], /, *, features_only: bool) -> Tensor: ...


class LiveModel:
    """A model in training, through its engine's forward pass.

    forward: takes fp32 pixels on this rank's device and casts them to the engine's dtype. The
    caller keeps the engine in evaluation mode while the task runs.
    """

    def __init__(self, forward: Forward, *, num_classes: int) -> None:
        self._forward, self.num_classes = forward, num_classes
        self.stored = FeatureStore()  # for the evaluations of one step: the next has other weights

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self._run(images, features_only=True)

    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        return self._run(images, features_only=False)

    @torch.no_grad()
    def _run(self, images: UInt8[Tensor, "B 3 H W"], *, features_only: bool) -> Float[Tensor, "B D"]:
        pixels = normalize(images.to(distributed.device(), non_blocking=True), torch.float32)
        return self._forward(pixels, features_only=features_only).float()
