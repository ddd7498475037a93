"""How the pixels of other libraries' models are normalised, and their models for our pixels.

A model takes (p - mean) / std per channel, of a pixel p in [0, 1].
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.models.names import Dialect

Pixels = Literal["half", "imagenet"]


class Normalisation(NamedTuple):
    """Of pixels in [0, 1], per channel; std is a standard deviation, above 0."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in self)
        return f"mean ({mean}) and deviation ({std})"


OURS = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NAMED: dict[Pixels, Normalisation] = {
    "half": OURS,
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def stated(
    path: str, format: str, config_json: Mapping[str, Any], processor: Mapping[str, Any]
) -> Normalisation | None:
    """What timm's config.json or transformers' preprocessor_config.json says; None for nothing.

    path: of the weights. Raises CheckpointError for values with which no pixel is normalised.
    """
    if format == "timm":
        values = config_json.get("pretrained_cfg") or config_json  # older files have one level
        return _parsed(f"{path}: config.json", values.get("mean"), values.get("std"))
    if format != "transformers":
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    factor = 1.0 if processor.get("do_rescale") is False else processor.get("rescale_factor", 1 / 255)
    return _parsed(f"{path}: preprocessor_config.json", mean, std, factor)


def _parsed(place: str, mean: Any, std: Any, factor: Any = 1 / 255) -> Normalisation | None:
    """factor: what transformers multiplies bytes by, before it normalises them."""
    if mean is None and std is None:
        return None
    if not (_is_rgb(mean) and _is_rgb(std) and min(std) > 0 and _is_rgb([factor] * 3) and factor > 0):
        raise CheckpointError(
            f"{place} has mean {mean!r}, deviation {std!r} and factor {factor!r} for pixels; they must be "
            "three numbers, three above 0, and one above 0: correct them"
        )
    scale = 255 * factor
    return Normalisation(tuple(value / scale for value in mean), tuple(value / scale for value in std))


def _is_rgb(values: Any) -> TypeGuard[list[float]]:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) == 3 and all(abs(value) < 1e6 for value in values)


def choose(path: str, dialect: Dialect, said: Normalisation | None, pixels: Pixels | None) -> Normalisation:
    """How the pixels of a model are normalised: as a file beside it says, or else as is given.

    Raises CheckpointError if these differ, and if timm or transformers, whose models are of
    both kinds, come with neither. Google's models take our pixels.
    """
    given = _NAMED[pixels] if pixels else None
    if said is None and given is None and dialect in ("timm", "transformers"):
        raise CheckpointError(
            f"{path}: no file beside the weights says how its pixels are normalised; add --pixels half (to "
            "[-1, 1], as Google's are) or --pixels imagenet (by ImageNet's mean and deviation, as DINO's are)"
        )
    if said and given and not all(map(_alike, sum(said, ()), sum(given, ()))):
        raise CheckpointError(
            f"{path}: a file beside the weights says that its pixels have {said}, which are not those of "
            f"--pixels {pixels}; drop that, or correct the file"
        )
    return said or given or OURS


def _alike(a: float, b: float) -> bool:
    return abs(a - b) < 1e-3


def fold_pixels(
    tensors: Iterable[tuple[str, Tensor]], normalisation: Normalisation
) -> Iterator[tuple[str, Tensor]]:
    """The same model for our pixels. `tensors`: the patch embedding's weight before its bias.

    From a pixel p in [0, 1] we make x, but the model was trained on y:

        x = (p - 0.5) / 0.5
        y = (p - mean) / std = (0.5 / std) x + (0.5 - mean) / std = scale x + shift

    so that kernel y + bias = (kernel scale) x + (bias + kernel shift).
    """
    means, deviations = (torch.tensor(values, dtype=torch.float64)[:, None] for values in normalisation)
    scale, shift = 0.5 / deviations, (0.5 - means) / deviations  # [3, 1] each
    bias_shift = torch.zeros(())
    for name, tensor in tensors:
        if name == "patch_embed.proj.weight":
            kernel = tensor.double().unflatten(1, (3, -1))  # [D, 3, P P]
            tensor, bias_shift = (kernel * scale).flatten(1).float(), (kernel * shift).sum((1, 2))  # [D]
        elif name == "patch_embed.proj.bias":
            tensor = (tensor + bias_shift).float()
        yield name, tensor
