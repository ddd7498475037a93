"""The teacher of a distillation: a frozen classifier, on each rank as a whole.

It is no part of the engine or of checkpoints; these hold a digest of it, so that no resume
continues with another one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitscale.checkpoint.verify import Checkpoint
from vitscale.errors import CheckpointError, ConfigError
from vitscale.evals.store import digest_of, model_digest
from vitscale.image_size import ImageSize, pixels, written
from vitscale.models import Model, ModelConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.objectives.distillation import TIMM, DistillationConfig
from vitscale.weights.foreign.convert import load_npz
from vitscale.weights.saved import load_model, locate

_NPZ = ".npz"


class Teacher:
    """A classifier in evaluation mode, without gradients: pixels in [-1, 1] to logits in fp32.

    digest: names it, whatever it computes in. weights: names its weights in fp32 alone, as
    earlier versions did. num_bytes: that they take.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Takes the module over. dtype: what it computes in."""
        self.weights = digest_of(module.state_dict().items())
        ours = isinstance(module, Model)
        self.digest = model_digest(self.weights, module.config) if ours else self.weights
        module = module.eval().requires_grad_(False).to(device)
        self._module, self._dtype = module.to(dtype) if isinstance(module, Model) else module, dtype
        self.num_bytes = sum(tensor.nbytes for tensor in self._module.state_dict().values())

    @torch.no_grad()
    def __call__(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        if isinstance(self._module, Model):
            return self._module(pixels.to(self._dtype)).float()
        # Others may have running means and deviations, for which 16 bit are too few.
        with torch.autocast(pixels.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._module(pixels).float()


def place_of(config: DistillationConfig) -> str | Checkpoint:
    """What objective.teacher means at this moment: of a live run, its newest checkpoint.

    Every rank calls it.
    """
    is_place = config.is_timms or config.teacher.endswith(_NPZ)
    return config.teacher if is_place else locate(config.teacher)


def load_teacher(
    config: DistillationConfig,
    place: str | Checkpoint,
    student: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Teacher:
    """The teacher of a config, for the images and classes of its student. place: from place_of.

    Raises CheckpointError for what cannot be read, and ConfigError for a teacher that takes
    other images or has other classes.
    """
    module = _timms(config, student) if config.is_timms else _ours(place, student)
    return Teacher(module, device, dtype)


def _ours(place: str | Checkpoint, student: ModelConfig) -> Model:
    path = str(place)
    module = load_npz(path) if path.endswith(_NPZ) else load_model(place)
    config = module.config
    _check_classes(path, config.num_classes, student)
    if isinstance(config, ResNetConfig):  # it takes images of any size
        module.config = dataclasses.replace(config, image_size=student.image_size)
    else:
        _check_size(path, config.image_size, student)
    return module


def _timms(config: DistillationConfig, student: ModelConfig) -> nn.Module:
    """A model of timm, for our pixels."""
    name = config.teacher.removeprefix(TIMM)
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is for another torch
        raise ConfigError(
            f"objective.teacher {config.teacher} needs timm, which cannot be imported "
            f"({_first_line(error)}); install it with the torchvision for torch {torch.__version__}: "
            "pip install timm torchvision, for torch without CUDA with --extra-index-url "
            "https://download.pytorch.org/whl/cpu"
        ) from None
    module: Any
    try:
        if config.teacher_weights:
            module = timm.create_model(name, num_classes=student.num_classes)
        else:
            module = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"objective.teacher {config.teacher}: timm cannot make this model ({_first_line(error)}); name "
            "one of timm.list_models(), or a file of its weights in objective.teacher_weights"
        ) from None
    if config.teacher_weights:
        _fill(module, config.teacher_weights, name)
    traits: Mapping[str, Any] = module.pretrained_cfg
    _check_classes(config.teacher, module.num_classes, student)
    if traits.get("fixed_input_size"):
        _check_size(config.teacher, traits["input_size"][-1], student)
    return _OnOurPixels(module, traits["mean"], traits["std"])


class _OnOurPixels(nn.Module):
    """A model that was trained on (p - mean) / std, with p in [0, 1], for pixels in [-1, 1]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.module = module
        means, deviations = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 0.5 / deviations)
        self.register_buffer("shift", (0.5 - means) / deviations)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(pixels * self.scale + self.shift)


def _fill(module: nn.Module, path: str, name: str) -> None:
    """Give a module the weights of a safetensors file, which must be exactly its own."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"objective.teacher_weights {path} cannot be read as safetensors ({_first_line(error)}); of a "
            "pickle, write one by safetensors.torch.save_file"
        ) from None
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    # Files may lack a counter of BatchNorm, which evaluation does not read.
    shapes = {key: () for key in expected if key.endswith("num_batches_tracked")}
    shapes |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != expected:
        misfit = min(key for key in {*expected, *shapes} if expected.get(key) != shapes.get(key))
        raise CheckpointError(
            f"objective.teacher_weights {path} are not those of timm's {name} with this number of classes: "
            f"{misfit} is {shapes.get(misfit, 'missing')}, and there {expected.get(misfit, 'missing')}"
        )
    module.load_state_dict(tensors, strict=False)


def _check_classes(teacher: str, num_classes: int, student: ModelConfig) -> None:
    if num_classes != student.num_classes:
        raise ConfigError(
            f"objective.teacher {teacher} has {num_classes:,} classes, and model.num_classes is "
            f"{student.num_classes:,}; name a teacher that was trained on the student's classes"
        )


def _check_size(teacher: str, size: ImageSize, student: ModelConfig) -> None:
    if size != student.image_size:
        wanted = written(student.image_size)
        raise ConfigError(
            f"objective.teacher {teacher} takes images of {pixels(size)}, and model.image_size is {wanted}; "
            f"fine-tune the teacher at {wanted}, or set model.image_size = {written(size)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
