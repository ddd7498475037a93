"""Checkpoints and exports as plain models: weights, configuration and the nn.Module."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import Manifest, saved_config
from vitscale.checkpoint.verify import Checkpoint, open_directory, open_together
from vitscale.config import choose
from vitscale.errors import CheckpointError
from vitscale.image_size import ImageSize
from vitscale.models import Model, ModelConfig, build_model, empty_model
from vitscale.models.transfer import check_backbone, check_head, is_backbone, is_head, transferred
from vitscale.weights.files import TensorSource, Weights, find_export

Slot = Literal["fp32", "ema"]
# Settings of what a model for other images does not take over, and of what a new head lacks.
_OF_PATCHES, _OF_HEAD = ("num_patch_outputs",), ("representation_size", "head_bias")


class SavedModel:
    """The weights and the configuration of a model on disk or in a store (a TensorSource).

    path: a run directory (its newest good checkpoint), a step directory, or an export (the
    file, the index of its shards, or the folder of either); or a checkpoint that was verified.
    slot: "fp32" for the weights, "ema" for their average over training, if the run kept one.
    Raises CheckpointError for any other path, and for damage; ConfigError for another slot.
    """

    def __init__(self, path: str | Path | Checkpoint, *, slot: Slot = "fp32") -> None:
        choose(slot, get_args(Slot), "slot")
        export = "" if isinstance(path, Checkpoint) else find_export(str(path))
        self._source: TensorSource
        if export:
            self.path = export
            self._source = weights = Weights(export)
            self.step, model = _read_metadata(weights)
            slots, writer = ("fp32",), weights.metadata.get("vitscale.version", "another version")
        else:
            checkpoint = path if isinstance(path, Checkpoint) else open_directory(str(path))
            self.path, manifest = checkpoint.folder, checkpoint.manifest
            self._source = _CheckpointWeights(self.path, manifest, slot)
            self.step, model = manifest.step, manifest.train.config.get("model")
            slots, writer = manifest.slots, manifest.train.writer
        self.shapes = dict(self._source.shapes)
        if slot == "ema" and slot not in slots:
            raise CheckpointError(
                f"{self.path} holds no average of the weights (EMA); take the weights (without --ema, "
                'init.ema = false, slot="fp32"), or train with optim.ema_decay'
            )
        if not isinstance(model, dict):
            raise CheckpointError(f"{self.path} names no model configuration: vitscale did not write it")
        self.config: ModelConfig = saved_config(ModelConfig, model, "model", self.path, writer)

    def empty_model(self) -> Model:
        """The model of the configuration, without values.

        Raises CheckpointError unless the tensors here are those of the model.
        """
        problem = f"{self.path} does not hold the model that it names"
        depth = self.config.num_blocks
        if depth > len(self.shapes):  # counted first: even empty, a hostile number of blocks never ends
            raise CheckpointError(f"{problem}: {depth:,} blocks in {len(self.shapes):,} tensors")
        model = empty_model(self.config)
        expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
        if self.shapes != expected:
            names = {*expected, *self.shapes}
            misfit = min(name for name in names if expected.get(name) != self.shapes.get(name))
            raise CheckpointError(f"{problem}: {misfit} does not fit")
        return model

    def load(self, device: torch.device | str = "cpu") -> Model:
        """As load_model."""
        model = self.empty_model().allocate(device)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(self.tensor(name))
        return model.eval()

    def names_for(self, target: ModelConfig, *, head: bool) -> list[str]:
        """The tensors that a model of another config takes over; head: also those of the head.

        Raises ConfigError, naming the key, unless the models share a backbone (and a head), and
        CheckpointError as empty_model.
        """
        self.empty_model()
        check_backbone(self.config, target)
        if head:
            check_head(self.config, target)
        return [name for name in self.shapes if is_backbone(name) or (head and is_head(name))]

    def taken_over(self, target: ModelConfig, *, head: bool) -> Iterator[tuple[str, Tensor]]:
        """The tensors of names_for as a model of `target` has them, read one by one.

        Raises CheckpointError for values that are not finite.
        """
        for name in self.names_for(target, head=head):
            tensor = self.tensor(name)
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{self.path}: {name} has values that are not finite; take an earlier checkpoint"
                )
            yield name, transferred(name, tensor, self.config, target)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, as fp32."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path} holds no {name}, which the model that it names has")
        return self._source.tensor(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, read one by one, as fp32."""
        return ((name, self.tensor(name)) for name in self.shapes)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by parameter name, as fp32."""
        return dict(self.tensors())


def load_model(
    path: str | Path | Checkpoint,
    *,
    slot: Slot = "fp32",
    device: torch.device | str = "cpu",
    image_size: ImageSize | None = None,
    num_classes: int | None = None,
) -> Model:
    """The model of a checkpoint or export: a plain nn.Module in eval mode, fp32, on `device`.

    path, slot: as in SavedModel. One tensor at a time is read, and DeepSpeed is not needed.
    image_size: of other images than those it was trained on, pixels of a square or (height,
        width); position embeddings are resized (paper, section 3.2).
    num_classes: of a new head of zeros in place of the whole one (likewise); 0 for none.

    Raises CheckpointError for what is no checkpoint or export, and for damage; ConfigError for
    another slot, and a size or a number of classes that the model cannot have.
    """
    saved = SavedModel(path, slot=slot)
    if image_size is None and num_classes is None:
        return saved.load(device)
    new_head = num_classes is not None
    left_out = (*_OF_PATCHES, *(_OF_HEAD if new_head else ()))
    fields = dataclasses.fields(saved.config)
    changes: dict[str, object] = {field.name: field.default for field in fields if field.name in left_out}
    if image_size is not None:
        changes["image_size"] = image_size
    if new_head:
        changes["num_classes"] = num_classes
    target = dataclasses.replace(saved.config, **changes)
    model = build_model(target, seed=0)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in saved.taken_over(target, head=not new_head):
            params[name].copy_(value)
    return model.to(device).eval()


def locate(path: str | Path) -> str | Checkpoint:
    """What `path` means at this moment, for SavedModel: an export, or a verified checkpoint.

    Every rank calls it, all verify together, and all get the same: a live run saves new ones.
    """
    export = distributed.on_main(lambda: find_export(str(path)))
    return export or open_together(str(path))


class _CheckpointWeights:
    """One slot of a checkpoint as a TensorSource."""

    def __init__(self, folder: str, manifest: Manifest, slot: Slot) -> None:
        self._reader, self._slot = FragmentReader(folder, manifest), slot
        self.shapes = {name: info.shape for name, info in manifest.of_model.items()}

    def tensor(self, name: str) -> Tensor:
        return self._reader.whole(name, self._slot)


def _read_metadata(weights: Weights) -> tuple[int, object]:
    """The step, and the plain values of the model's configuration."""
    try:
        model = json.loads(weights.metadata["vitscale.model"])
        step = int(weights.metadata["vitscale.step"])
    except KeyError:
        raise CheckpointError(
            f"{weights.path} was not exported by vitscale: it names no model configuration; convert it with "
            "tools/checkpoint.py import"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{weights.path} has damaged metadata; copy it again") from None
    return step, model
