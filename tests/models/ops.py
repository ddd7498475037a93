"""Counts the operations that torch carries out."""

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts the operations that are carried out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.num: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
