"""vitscale pretrains Vision Transformers (arXiv 2010.11929) at scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscale.weights.export import save_model as save_model
    from vitscale.weights.saved import load_model as load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import vitscale.config` and --help need not wait for torch.
    if name == "load_model":
        from vitscale.weights.saved import load_model

        return load_model
    if name == "save_model":
        from vitscale.weights.export import save_model

        return save_model
    raise AttributeError(f"module 'vitscale' has no attribute {name!r}")
