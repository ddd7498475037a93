"""The size of a model's images, as configs and functions take it."""

ImageSize = int | tuple[int, int]  # a square's side, or (height, width), in pixels


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width. Raises ValueError for what is no size."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, tuple | list) or [type(side) for side in size] != [int, int]:
        raise ValueError(f"image_size {size!r} must be a whole number, like 224, or (height, width)")
    height, width = size
    return height, width


def image_size(height: int, width: int) -> ImageSize:
    """The size as configs keep it: of a square one number, as they were before others came."""
    return height if height == width else (height, width)


def whole_patches(size: ImageSize, patch: int) -> ImageSize:
    """The size with each side rounded down to a multiple of `patch`; a smaller side is kept."""
    height, width = (side - side % patch or side for side in sides(size))
    return image_size(height, width)


def written(size: ImageSize) -> str:
    """As a config file has it: 224, or [384, 128]."""
    return str(size if isinstance(size, int) else list(size))


def pixels(size: ImageSize) -> str:
    """As titles have it: 224 px, or 384 x 128 px."""
    return f"{size if isinstance(size, int) else f'{size[0]} x {size[1]}'} px"
