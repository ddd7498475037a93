"""Evaluate a checkpoint: from the file to a plain module, to a task, to numbers."""

import logging
import shlex
from typing import Any

import torch

from vitscale import distributed
from vitscale.checkpoint.manifest import saved_config
from vitscale.checkpoint.verify import Checkpoint
from vitscale.data.sources import Source, open_sources
from vitscale.errors import CheckpointError, ConfigError, NotFinite
from vitscale.evals import ClassifyConfig, EvalConfig, open_task
from vitscale.evals.adapters import FrozenModel
from vitscale.evals.classify import ClassifyTask
from vitscale.evals.predictions import summary, write
from vitscale.evals.store import FeatureStore, digest_of, model_digest
from vitscale.evals.task import EvalModel, Task, run_task, within_memory
from vitscale.job import derive
from vitscale.objectives.losses import LossConfig
from vitscale.system import hardware
from vitscale.train_config import TrainConfig
from vitscale.weights.saved import SavedModel, Slot, locate

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: str,
    name: str,
    config: EvalConfig,
    device: torch.device,
    slot: Slot = "fp32",
    cache: str = "",
    predictions: str = "",
) -> dict[str, Any]:
    """Run the task `name` on a run, a step directory or an export.

    Every rank calls it and gets the same, accuracies as fractions of 1:

        {"checkpoint": ..., "step": 5000, "results": {"top1": 0.52, ...}}

    For an evaluation of the head, "details" has what predictions.summary gives.

    cache: a folder that keeps features for the next time; "" = none.
    predictions: a file for those of the head; "" = none.
    slot: "ema" takes the average of the weights, as evaluations in training do where there
    is one. A validation split is that of the data that the run was trained on. Raises
    CheckpointError or DataError for what cannot be read as it is, CheckpointError for a model
    whose features or logits are not finite, and ConfigError where there is no such split.
    """
    hardware.allow_tf32(False)
    place = locate(checkpoint)
    _warn_of_map(place, config)
    saved = distributed.together(lambda: SavedModel(place, slot=slot))
    module = distributed.together(lambda: saved.load(device))
    digest = model_digest(digest_of(module.state_dict().items()), saved.config) if cache else ""
    model = FrozenModel(module, device, FeatureStore(cache, digest))
    splits = isinstance(config, ClassifyConfig) and config.split
    source, loss = distributed.together(lambda: training_data(place)) if splits else (None, None)
    task = distributed.together(lambda: open_task(name, config, model.image_size, source, loss))
    try:
        return {"checkpoint": checkpoint, "step": saved.step, **scored(task, model, predictions)}
    except NotFinite as error:
        raise CheckpointError(
            f"{checkpoint}, step {saved.step:,}: {error}, so there is nothing to score; evaluate the weights "
            "of an earlier step",
            shared=True,
        ) from None


def scored(task: Task, model: EvalModel, predictions: str) -> dict[str, Any]:
    """The "results" of a task, and the "details" where the head is evaluated.

    Every rank calls it. predictions: as of evaluate.
    """
    if not isinstance(task, ClassifyTask):
        return {"results": run_task(task, model)}
    found = within_memory(task, lambda: task.predict(model).gathered())
    if predictions:
        distributed.on_main(lambda: write(predictions, found, task.test))
    return {"results": task.results(found.counts(), model), "details": summary(found, task.test)}


def _warn_of_map(place: str | Checkpoint, config: EvalConfig) -> None:
    """Warn if the run's label map might be missing for test shards. place: from locate."""
    if not (isinstance(place, Checkpoint) and isinstance(config, ClassifyConfig) and config.test):
        return
    data = place.manifest.train.config.get("data", {})
    sources = data.get("sources") or [data]
    if len(sources) == 1 and sources[0].get("label_map") and not config.label_map:
        logger.warning(
            "%s was trained with data.label_map: the labels of %s are not mapped; if they are those of %s, "
            "pass --label-map %s",
            place.folder, config.test, sources[0]["index"], shlex.quote(sources[0]["label_map"]),
        )  # fmt: skip


def training_data(place: str | Checkpoint) -> tuple[Source, LossConfig]:
    """The data that the run of a checkpoint was trained on, and the loss. place: from locate.

    Raises ConfigError if they are several sources or have no validation split, and if they are
    others now: samples of the split might then have been trained on.
    """
    if not isinstance(place, Checkpoint):
        raise ConfigError(
            f"{place} is an export, which does not name the data that it was trained on; evaluate the run "
            "itself, or name test shards with --data"
        )
    path, train = place.folder, place.manifest.train
    config = saved_config(TrainConfig, train.config, "", path, train.writer)
    if not config.data.validation_fraction:
        raise ConfigError(
            f"{path} was trained with data.validation_fraction = 0, on all of its data; name test shards "
            "with --data"
        )
    job = derive(config, place.manifest.world_size, open_sources(config.data))
    if job.data_fingerprint != train.data_fingerprint:
        raise ConfigError(
            f"{path} was trained on other data than its config names now, so it may have been trained on "
            f"samples of their validation split; restore {config.data.index}, or name test shards with --data"
        )
    return job.sources[0], config.loss
