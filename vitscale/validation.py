"""Evaluations of the model in training, and pictures of what it has learned."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence

from jaxtyping import UInt8
from torch import Tensor

from vitscale import distributed
from vitscale.errors import ConfigError, NotFinite
from vitscale.evals.adapters import LiveModel
from vitscale.evals.task import EvalModel, Task, run_task
from vitscale.guard.watch import Watch
from vitscale.inspection.attention import as_vit
from vitscale.inspection.live import observe
from vitscale.job import Job
from vitscale.start import Run

logger = logging.getLogger(__name__)


def evaluate(run: Run, names: Sequence[str], watch: Watch) -> bool:
    """Run evaluations, with the average of the weights if there is one; every rank calls it.

    Returns whether they came to their end. If a rank is asked to stop, they are broken off, and
    the next start repeats them.
    """
    if not names:
        return True
    config, agreed = run.job.config.model, distributed.Agreement(1)

    def forward(pixels: Tensor, *, features_only: bool) -> Tensor:
        if any(agreed(watch.asked)):  # on all ranks in the same batch: they have equally many
            raise BrokenOff
        return run.engine.forward(pixels, features_only=features_only)

    model = LiveModel(forward, num_classes=config.num_classes)
    try:
        with run.engine.evaluating():
            for name in names:
                results = results_at(run.progress.step, run.tasks[name], model, f"evals.{name}")
                numbers = {f"eval/{name}/{key}": value for key, value in results.items()}
                check_judge(run.job, name, numbers)
                run.metrics.write(run.progress.step, numbers)
    except BrokenOff:
        return False
    return True


def results_at(step: int, task: Task, model: EvalModel, where: str) -> dict[str, float]:
    """The results of a task, all nan if the model's features or logits are not finite.

    Every rank calls it. The run goes on: its guard decides whether it has diverged.
    where: the section's dotted name.
    """
    try:
        return run_task(task, model, where)
    except NotFinite as error:
        if distributed.is_main():
            logger.warning("step %d: %s: %s, so its results are nan", step, where, error)
        return dict.fromkeys(task.names(model), math.nan)


def draw(run: Run, images: UInt8[Tensor, "B 3 H W"]) -> None:
    """Show in TensorBoard what the model has learned; every rank calls it."""
    with run.engine.evaluating():
        forward = functools.partial(run.engine.forward, features_only=True)
        learned = observe(as_vit(run.engine.module), forward, images)
    for name, pictures in learned.pictures.items():
        run.metrics.write_images(f"learned/{name}", pictures, run.progress.step)
    distances = {f"learned/attention_distance_{n:02d}": d for n, d in enumerate(learned.distances)}
    run.metrics.write(run.progress.step, distances)


def check_judge(job: Job, name: str, numbers: Mapping[str, float]) -> None:
    """Raise ConfigError if keep_best asks for a number that its evaluation does not have."""
    judge = job.config.checkpoint.keep_best
    if judge.startswith(f"eval/{name}/") and judge not in numbers:
        raise ConfigError(
            f'checkpoint.keep_best "{judge}" is no number of evals.{name}, which has {", ".join(numbers)}',
            shared=True,
        )


def best_so_far(run: Run, evaluated: Sequence[str]) -> bool:
    """Whether an evaluation of this step is the best that checkpoint.keep_best has seen.

    Every rank calls it. evaluated: the names of those that were due.
    """
    judge = run.job.config.checkpoint.keep_best
    if not judge or judge.split("/")[1] not in evaluated:
        return False
    return distributed.on_main(lambda: run.metrics.is_best(run.progress.step))


class BrokenOff(Exception):
    """An evaluation was not finished, because the run is to stop."""
