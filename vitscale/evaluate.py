"""Evaluate a checkpoint: from the file to a plain module, to a task, to numbers."""

from typing import Any

import torch

from vitscale import distributed
from vitscale.evals import EvalConfig, open_task
from vitscale.evals.adapters import FrozenModel
from vitscale.weights.saved import Slot, load_model, locate


def evaluate(
    checkpoint: str, name: str, config: EvalConfig, device: torch.device, slot: Slot = "fp32"
) -> dict[str, Any]:
    """Run the task `name` on a run, a step directory or an export.

    Every rank calls it and gets the same, accuracies as fractions of 1:

        {"checkpoint": ..., "step": 5000, "results": {"top1": 0.52, ...}}

    slot: "ema" takes the average of the weights, as evaluations in training do where there
    is one. Raises CheckpointError or DataError for what cannot be read as it is.
    """
    # The newest checkpoint of a live run may change meanwhile, so rank 0 decides which it is.
    path, step = distributed.on_main(lambda: locate(checkpoint, slot))
    model = FrozenModel(distributed.together(lambda: load_model(path, slot=slot, device=device)), device)
    task = distributed.together(lambda: open_task(name, config, model.image_size))
    return {"checkpoint": checkpoint, "step": step, "results": task.run(model)}
