"""Image sizes as other libraries' config.json state them.

Position embeddings say how many patches there are, but in how many rows only of a square.
"""

from collections.abc import Mapping
from typing import Any

from vitscale.image_size import ImageSize, image_size, sides
from vitscale.models.names import Dialect


def stated(dialect: Dialect, config_json: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The key of the image size, and its value, as it stands; None if there is none."""
    if dialect == "transformers":
        return "image_size", config_json.get("image_size", 224)
    if dialect != "timm":
        return None
    size = (config_json.get("model_args") or {}).get("img_size")
    if size is not None:
        return "img_size", size
    # timm's models of a square size take others: only another shape says something.
    input_size = (config_json.get("pretrained_cfg") or {}).get("input_size")
    if isinstance(input_size, list) and len(set(map(str, input_size[1:]))) > 1:
        return "input_size", input_size[1:]
    return None


def parsed(value: Any) -> ImageSize | None:
    """What config.json states as a size; None if it is none."""
    height_width = value if isinstance(value, list) else [value, value]
    if len(height_width) != 2 or not all(type(side) is int and side > 0 for side in height_width):
        return None
    return image_size(*height_width)


def num_patches(size: ImageSize, patch_size: int) -> int:
    """Patches of an image; 0 if its sides are not multiples of a patch's."""
    height, width = sides(size)
    fits = patch_size > 0 and not height % patch_size and not width % patch_size
    return (height // patch_size) * (width // patch_size) if fits else 0
