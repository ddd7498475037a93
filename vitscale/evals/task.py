"""What all evaluations share: the common keys, and the interfaces of tasks and models.

A task asks a model for features or logits and knows nothing of trainers or checkpoints, so
the same one runs on a model in training and on one from a file (adapters.py).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor

from vitscale.config import check_choices, dotted, positive
from vitscale.data.evalset import EvaluationSet
from vitscale.data.sources import Source
from vitscale.data.transforms import Crop
from vitscale.errors import ConfigError
from vitscale.evals.store import FeatureStore
from vitscale.image_size import ImageSize
from vitscale.system import hardware

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The keys that every kind of evaluation has.

    kind:         each kind's own class sets it
    test:         the shards to score (a glob, brace pattern or URL), or an index.json
    every_steps:  how often it runs in training, besides before and after all steps
    crop:         "resize" squeezes the image to image_size; "resize_center" squeezes it to
                  image_size * 256 / 224, and crops the centre; "center" keeps its aspect ratio:
                  it resizes the image to cover image_size * 256 / 224, and crops the centre
    batch_size:   images in a forward pass of one rank
    num_workers:  decoding processes per rank; 0 decodes in the main process; -1 = as many as
                  training has (engine.num_workers), none in an evaluation by hand
    """

    kind: str = ""
    test: str = ""
    every_steps: int = 1000
    crop: Crop = "resize"
    batch_size: int = 256
    num_workers: int = -1

    def __post_init__(self) -> None:
        check_choices(self)

    def resolved_num_workers(self, of_training: int) -> int:
        """of_training: engine.num_workers, or 0 by hand."""
        return of_training if self.num_workers < 0 else self.num_workers

    def check(self, where: str) -> None:
        """Raise ConfigError for a value that does not fit. where: the section's dotted name."""
        self.check_test(where)
        positive(where, every_steps=self.every_steps, batch_size=self.batch_size)
        if self.num_workers < -1:
            raise ConfigError(
                f"{dotted(where, 'num_workers')} {self.num_workers} must be 0, which decodes in the main "
                "process, or more; -1 takes engine.num_workers"
            )

    def check_test(self, where: str) -> None:
        """Raise ConfigError unless the section says what to score."""
        if not self.test:
            raise ConfigError(
                f"{dotted(where, 'test')} is empty: an evaluation needs test shards, "
                "like data/cifar10/test-*.tar"
            )


@runtime_checkable
class EvalModel(Protocol):
    """What a task needs of a model. Images come on the CPU; results may be on any device."""

    @property
    def num_classes(self) -> int: ...

    @property
    def stored(self) -> FeatureStore: ...

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]: ...

    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]: ...


@runtime_checkable
class Task(Protocol):
    """An evaluation with its data open."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> TaskConfig: ...

    def names(self, model: EvalModel) -> list[str]:
        """The names of the results of run()."""
        ...

    def run(self, model: EvalModel) -> dict[str, float]:
        """Results by name, as fractions of 1. Every rank calls it and gets the same.

        Raises NotFinite, on every rank, if the model's features or logits are not finite.
        """
        ...


def num_samples(task: Task) -> int:
    """Of the largest of the task's sets."""
    return max(value.num_samples for value in vars(task).values() if isinstance(value, EvaluationSet))


def run_task(task: Task, model: EvalModel, where: str = "") -> dict[str, float]:
    """As task.run. Raises ConfigError if its batches do not fit into this rank's GPU."""
    return within_memory(task, lambda: task.run(model), where)


def within_memory(task: Task, run: Callable[[], T], where: str = "") -> T:
    """Run a part of a task. Raises ConfigError if its batches do not fit into this rank's GPU.

    where: the section's dotted name; "" for an evaluation by hand.
    """
    try:
        return run()
    except RuntimeError as error:
        if not hardware.lacks_memory(error):
            raise
        size = task.config.batch_size
        key = dotted(where, "batch_size") if where else "--batch-size"
        way_out = f"set {key} to {size // 2}, or lower" if size > 1 else "use a GPU with more"
        raise ConfigError(f"{task.name}: CUDA is out of memory with {key} {size}; {way_out}") from None


def open_shards(
    pattern: str, config: TaskConfig, image_size: ImageSize, label_map: str = ""
) -> EvaluationSet:
    """The samples of `pattern`, decoded by `config`. Raises DataError for missing shards.

    label_map: a file, as of data.label_map; "" = none.
    """
    return EvaluationSet.open(
        pattern,
        image_size=image_size,
        crop=config.crop,
        num_workers=config.resolved_num_workers(0),
        label_map=label_map,
    )


def open_split(source: Source, config: TaskConfig, image_size: ImageSize) -> EvaluationSet:
    """The validation split of the training data, decoded by `config`."""
    return EvaluationSet(
        source.index,
        image_size=image_size,
        crop=config.crop,
        num_workers=config.resolved_num_workers(0),
        source=source,
    )
