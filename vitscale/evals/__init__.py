"""Evaluations by configuration ([evals.NAME]).

To add a kind: write its config (a TaskConfig) and its task (a Task) in a file of their own,
name the config in EvalConfig and open the task in open_task. tools/evaluate.py has a command
for each kind.
"""

from vitscale.config import dotted
from vitscale.data.sources import Source
from vitscale.evals.classify import ClassifyConfig, ClassifyTask
from vitscale.evals.fewshot import FewShotConfig, FewShotTask
from vitscale.evals.kmeans import KMeansConfig, KMeansTask
from vitscale.evals.knn import KnnConfig, KnnTask
from vitscale.evals.linear import LinearConfig, LinearTask
from vitscale.evals.logistic import LogisticConfig, LogisticTask
from vitscale.evals.task import Task
from vitscale.image_size import ImageSize
from vitscale.objectives.losses import LossConfig

# [evals.NAME] without a kind is the first one.
EvalConfig = ClassifyConfig | FewShotConfig | KnnConfig | LogisticConfig | LinearConfig | KMeansConfig


def open_task(
    name: str,
    config: EvalConfig,
    image_size: ImageSize,
    source: Source | None = None,
    loss: LossConfig | None = None,
) -> Task:
    """Open the data of [evals.NAME]. The task that it returns can run often, on any model.

    source, loss: of the training, for evaluations of its validation split.
    A shard that is missing raises DataError here, and so before training starts; a value of the
    section that does not fit, ConfigError.
    """
    config.check(dotted("evals", name))  # of a section that Python code built, not from_dict
    match config:
        case ClassifyConfig():
            return ClassifyTask.open(name, config, image_size, source, loss)
        case FewShotConfig():
            return FewShotTask.open(name, config, image_size)
        case KnnConfig():
            return KnnTask.open(name, config, image_size)
        case LogisticConfig():
            return LogisticTask.open(name, config, image_size)
        case LinearConfig():
            return LinearTask.open(name, config, image_size)
        case KMeansConfig():
            return KMeansTask.open(name, config, image_size)
