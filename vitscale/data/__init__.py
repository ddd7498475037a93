"""What training reads. `load` and BatchDataset offer it to any other training loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscale.data.dataset import BatchDataset as BatchDataset
    from vitscale.data.dataset import load as load
    from vitscale.data.loader import Batch as Batch
    from vitscale.data.transforms import AugmentConfig as AugmentConfig

__all__ = ["AugmentConfig", "Batch", "BatchDataset", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: --help need not wait for torch.
    if name in __all__:
        from vitscale.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module 'vitscale.data' has no attribute {name!r}")
