"""Exports to ONNX, whose outputs are compared with the model's own before they appear.

Needs onnxscript and onnxruntime, of the extra onnx.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.image_size import sides
from vitscale.models.model import Model
from vitscale.stores import storage
from vitscale.weights.export import export_metadata
from vitscale.weights.files import ONNX_NAME
from vitscale.weights.publish import publishing
from vitscale.weights.saved import SavedModel, Slot

_LARGEST_FILE = 1.9e9  # bytes of weights; Protocol Buffers end at 2 GiB
_CHECKED_BATCHES = (1, 3)
_TOLERANCE = 1e-4  # of the largest output, or of 1


def export_onnx(path: str | Path, out: str | Path, *, slot: Slot = "fp32") -> Path:
    """Write a checkpoint's model as ONNX, and return the path of the file.

    path, slot: as in SavedModel. out: FILE.onnx, or a folder for model.onnx and its weights
    beside it, as a model above 2 GB must be. The input "images" is [batch, 3, H, W] in [-1, 1],
    fp32; the output is "logits" [batch, C], or "features" [batch, D] of a model without a head.

    Raises ConfigError for lacking packages and for the name of another kind of file, and
    CheckpointError if onnxruntime computes other outputs than the model: nothing is written.
    """
    out = storage.local_output(out)
    saved = SavedModel(path, slot=slot)
    model = saved.load()
    as_folder = out.suffix != ".onnx"
    size = sum(param.nbytes for param in model.parameters())
    if not as_folder and size > _LARGEST_FILE:
        raise ConfigError(f"{out} cannot hold {size / 1e9:.1f} GB: an ONNX file ends at 2; name a folder")
    if as_folder and out.suffix:
        raise ConfigError(f"{out} has the name of a {out.suffix} file; end it in .onnx, or name a folder")
    metadata = export_metadata(saved.config, saved.step, "fp32") | {"vitscale.state": slot}
    with publishing(out) as temporary:
        if as_folder:
            temporary.mkdir()
        file = temporary / ONNX_NAME if as_folder else temporary
        program = _to_onnx(model)
        program.model.metadata_props.update(metadata)
        program.save(file, external_data=as_folder)
        _check(file, model)
    return out / ONNX_NAME if as_folder else out


def _to_onnx(model: Model) -> Any:
    """The model as a torch.onnx.ONNXProgram, for batches of any size."""
    try:
        import onnxruntime  # noqa: F401  # told before the minutes of an export
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError(
            "ONNX needs onnxscript and onnxruntime; install them: bash tools/setup.sh onnx"
        ) from None
    # With gradients, torch traces relative positions for a kernel that it does not export.
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (_images(model, 2),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits" if model.config.num_classes else "features"],
            verbose=False,
        )
    assert program is not None  # it is only without dynamo
    return program


@torch.no_grad()
def _check(file: Path, model: Model) -> None:
    """Raise CheckpointError unless onnxruntime computes the model's outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in _CHECKED_BATCHES:
        images = _images(model, batch)
        expected = model(images)
        (found,) = session.run(None, {"images": images.numpy()})
        error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1)
        if not error <= _TOLERANCE:
            raise CheckpointError(
                f"onnxruntime's outputs for {batch} images differ from the model's by {error:.1e} of the "
                f"largest, more than {_TOLERANCE:.0e}: nothing was written; another version of torch or "
                "onnxscript may help"
            )


def _images(model: Model, batch: int) -> Tensor:
    size = sides(model.config.image_size)
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on each node, on torchvision and on torch's old names."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
