"""What torch.compile is asked for, and operations of a block with a form of their own for it.

A compiled block spends on a GPU some fifth of its time in passes over memory and in special
functions. These forms make fewer of both; uncompiled they would make more.
"""

import math
import os
import socket
import stat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscale.errors import ConfigError


def check_cache() -> None:
    """Raise ConfigError if another user could write what torch takes from its cache.

    torch unpickles what it finds there, and the default is a name in /tmp that anyone can guess
    and make first. A cache that is missing is made, for this user alone. In a folder that
    TORCHINDUCTOR_CACHE_DIR names, a group may write.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    path = Path(chosen or default_cache_dir())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:  # maybe by another rank
        owners, mode = {path.lstat().st_uid, path.stat().st_uid}, path.stat().st_mode
        writers = stat.S_IWOTH if chosen else stat.S_IWGRP | stat.S_IWOTH
        if not owners <= {0, os.getuid()} or mode & writers:
            raise ConfigError(
                f"{path} on {socket.gethostname()}, from which torch.compile takes code, can be written by "
                "other users; remove it, or set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
            ) from None


def compile_options() -> dict[str, Any]:
    """What torch.compile is asked for; of a torch without these names, nothing."""
    try:
        from vitscale.models.kernel_choices import KernelChoices  # slow to import
    except ImportError:
        return {}
    return {"inductor_choices_class": KernelChoices}


def linear(x: Float[Tensor, "B N I"], layer: nn.Linear) -> Float[Tensor, "B N O"]:
    """layer(x). Compiled, the bias gradient is summed as the output's gradient is made."""
    if _compiling() and not torch.is_autocast_enabled(x.device.type):
        return _SummedByImage.apply(x, layer.weight, layer.bias)
    return layer(x)


def gelu(x: Float[Tensor, "*rest"], approximate: Literal["tanh", "none"]) -> Float[Tensor, "*rest"]:
    """GELU. Compiled, its tanh is a sigmoid: x (1 + tanh u) / 2 = x sigmoid(2 u).

    CUDA's tanh chooses between two ways for each value.
    """
    if approximate == "none" or not _compiling():
        return F.gelu(x, approximate=approximate)
    wide = x.to(_at_least_fp32(x.dtype))
    twice_u = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(twice_u)).to(x.dtype)


def _compiling() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _SummedByImage(torch.autograd.Function):
    """F.linear, whose bias gradient is summed over the tokens of each image, then over images.

    The compiler makes the first sum in the pass that writes the gradient. A sum over all tokens
    at once would read it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B N O"]) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        by_image = grad.sum(1, dtype=_at_least_fp32(grad.dtype))  # [B, O]
        return (
            grad @ weight,
            grad.flatten(0, 1).t() @ x.flatten(0, 1),
            by_image.sum(0).to(grad.dtype),
        )
