"""vitscale: Vision Transformers ("An Image is Worth 16x16 Words", arXiv 2010.11929) pretrained at scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscale.checkpoint.export import load_model as load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import vitscale.config` and every --help come without waiting for torch.
    if name == "load_model":
        from vitscale.checkpoint.export import load_model

        return load_model
    raise AttributeError(f"module 'vitscale' has no attribute {name!r}")
