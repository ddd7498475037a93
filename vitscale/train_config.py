"""The configuration of a training run: TrainConfig, the whole, and its small sections.

The other sections are declared beside the code that reads them.
"""

import dataclasses
import math
import re

from vitscale import config as configs
from vitscale.checkpoint.store import CheckpointConfig
from vitscale.data.data_config import DataConfig
from vitscale.data.mixture import check_repeats
from vitscale.data.transforms import AugmentConfig
from vitscale.engine.ds_config import EngineConfig, Precision
from vitscale.errors import ConfigError
from vitscale.evals import ClassifyConfig, EvalConfig
from vitscale.guard.config import GuardConfig
from vitscale.image_size import written
from vitscale.metrics.expect import ExpectConfig
from vitscale.models import ModelConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.objectives import ObjectiveConfig
from vitscale.objectives.classification import ClassificationConfig
from vitscale.objectives.distillation import DistillationConfig
from vitscale.objectives.losses import LossConfig
from vitscale.objectives.masked_patches import DOWNSIZED, MaskedPatchesConfig
from vitscale.optim.optimizers import OptimConfig
from vitscale.optim.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training ([log]).

    every_steps: how often a row goes to the console, TensorBoard and metrics.jsonl
    tensorboard: whether to write TensorBoard's files
    profile: the first and the last step of a trace of rank 0, like [100, 110]; [] = none
    norms: whether a row has the norms of weights, gradients and updates of each layer
    figures_every_steps: how often TensorBoard gets pictures of what a ViT has learned, of its
        filters, positions and attention to images of the batch; 0 = never
    """

    every_steps: int = 50
    tensorboard: bool = True
    profile: tuple[int, ...] = ()
    norms: bool = False
    figures_every_steps: int = 0

    def __post_init__(self) -> None:
        configs.positive("log", every_steps=self.every_steps)
        if self.figures_every_steps < 0:
            raise ConfigError(
                f"log.figures_every_steps {self.figures_every_steps} must not be negative; 0 = never"
            )
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ConfigError(
                f"log.profile {list(self.profile)} must name the first and the last step to trace, like "
                "[100, 110]"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What to start from ([init]).

    checkpoint:  a run, a step directory or an export; "" = from scratch
    full_state:  continue at that run's step with its optimizer state, under this config (other
                 data, another learning rate, a longer schedule); else take its weights alone
    ema:         take the average of its weights over training
    head:        take its head along, for the same classes; else the head starts anew
    """

    checkpoint: str = ""
    full_state: bool = False
    ema: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        given = [key for key in ("full_state", "ema", "head") if getattr(self, key)]
        if given and not self.checkpoint:
            raise ConfigError(f"init.{given[0]} = true needs init.checkpoint: the run to start from")
        if self.full_state and self.ema:
            raise ConfigError("init.full_state takes the average along; leave out init.ema")
        if self.full_state and self.head:
            raise ConfigError("init.full_state takes the head along; leave out init.head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How tools/evaluate.py finetune chooses and repeats a fine-tuning; training ignores it.

    learning_rates:  to choose among, in place of optim.lr; () = that one
    dev_fraction:    of the training set, to choose by; the chosen one is trained on all of it
    seeds:           of the runs at the chosen rate
    test_sets:       the index.json of further test sets in the model's classes, by name: those
                     runs are scored on them as well, and a file that is missing is passed over;
                     "" = none
    """

    learning_rates: tuple[float, ...] = ()
    dev_fraction: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)
    test_sets: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(rate <= 0 for rate in self.learning_rates):
            raise ConfigError(
                f"finetune.learning_rates {list(self.learning_rates)} must be above 0, like [0.01, 0.03]"
            )
        if not 0 <= self.dev_fraction < 1 or (len(self.learning_rates) > 1 and not self.dev_fraction):
            raise ConfigError(
                f"finetune.dev_fraction {self.dev_fraction} must lie in [0, 1), and above 0 where there are "
                "learning_rates to choose among; the paper has 0.01 to 0.1"
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"finetune.seeds {list(self.seeds)} must list different numbers from 0 up")
        for name in self.test_sets:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ConfigError(
                    f"finetune.test_sets.{name!r} names a folder; take letters, digits, _ and - alone"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    run_dir:        where its config, metrics and checkpoints are; with the same one it resumes
    seed:           of weights, order, augmentation and dropout
    global_batch:   images per optimizer step, over all devices
    total_steps, total_epochs, total_samples:
                    how long it is: set one of them; epochs may be fractional
    precision:      of the forward and backward pass; the optimizer keeps fp32 masters
    evals:          any number of evaluations, each by a name ([evals.NAME])
    """

    ALTERNATIVES = ("total_steps", "total_epochs", "total_samples")

    run_dir: str
    seed: int = 0
    global_batch: int = 1024
    total_steps: int = 0
    total_epochs: float = 0.0
    total_samples: int = 0
    precision: Precision = "fp32"
    model: ModelConfig = dataclasses.field(default_factory=ViTConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ClassificationConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    expect: ExpectConfig = dataclasses.field(default_factory=ExpectConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    evals: dict[str, EvalConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        configs.check_choices(self)
        if not self.run_dir.strip():
            raise ConfigError('run_dir is empty; name a folder, like "runs/a"')
        if "://" in self.run_dir:
            raise ConfigError(
                f'run_dir "{self.run_dir}" is a URL; run_dir is a folder on disk: set checkpoint.store = '
                f'"{self.run_dir}" and run_dir to a local folder'
            )
        configs.positive("", global_batch=self.global_batch)
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")
        totals = {name: getattr(self, name) for name in self.ALTERNATIVES}
        given = [f"{name} = {value}" for name, value in totals.items() if value]
        if len(given) != 1 or min(totals.values()) < 0:
            raise ConfigError(
                "set exactly one of total_steps, total_epochs, total_samples, above 0; "
                f"here: {', '.join(given) or 'none'}"
            )
        if not self.data.index and not self.data.sources:
            raise ConfigError(
                "data.index is missing: name the index.json of the training shards (or several in "
                "[[data.sources]]); make one with: python tools/data.py index SHARDS"
            )
        if self.total_epochs and len(self.data.sources) > 1:
            raise ConfigError(
                f"total_epochs = {self.total_epochs} has no meaning for several data.sources, "
                "each of which has its own epochs; use total_steps or total_samples"
            )
        check_repeats(self.global_batch, self.augment.repeats)
        if isinstance(self.objective, MaskedPatchesConfig):
            self._check_masked_patches(self.objective)
        elif isinstance(self.model, ViTConfig) and self.model.num_patch_outputs:
            raise ConfigError(
                f"model.num_patch_outputs {self.model.num_patch_outputs} makes a head on patches, which "
                f'objective.kind = "{self.objective.kind}" does not train; leave it out, or set '
                'objective.kind = "masked_patches"'
            )
        if self.log.figures_every_steps and not isinstance(self.model, ViTConfig):
            raise ConfigError(
                f'log.figures_every_steps shows a ViT, and model.kind is "{self.model.kind}"; leave it out'
            )
        if isinstance(self.objective, DistillationConfig):
            self._check_distillation(self.objective)
        if self.data.labels == "multi" and self.loss.name == "softmax":  # after kinds that take no "multi"
            raise ConfigError(
                'data.labels = "multi" needs loss.name = "sigmoid": softmax takes one class per image'
            )
        self._check_validation()
        self._check_judge()
        self._check_muon()
        reduced = self.engine.reduce_precision
        if reduced not in ("fp32", self.precision):
            raise ConfigError(
                f'engine.reduce_precision = "{reduced}" does not fit precision = "{self.precision}"; '
                + ('use "fp32"' if self.precision == "fp32" else f'use "fp32" or "{self.precision}"')
            )

    def _check_muon(self) -> None:
        if self.optim.name != "muon":
            return
        if self.engine.zero_stage == 3 or self.engine.offload_optimizer:
            key = "zero_stage = 3" if self.engine.zero_stage == 3 else "offload_optimizer = true"
            raise ConfigError(
                f'optim.name = "muon" does not run with engine.{key}, which leaves no rank a whole matrix or '
                "no GPU to make it orthogonal; use engine.zero_stage = 1 or 2 without offload, or "
                'optim.name = "adafactor" to save memory'
            )

    def _check_distillation(self, objective: DistillationConfig) -> None:
        kind, model = 'objective.kind = "distillation"', self.model
        if not model.num_classes:
            raise ConfigError(
                f"model.num_classes 0 leaves nothing for {kind} to train; set it to the teacher's number"
            )
        if self.data.labels != "single":
            raise ConfigError(f'{kind} takes one class per image; set data.labels = "single"')
        if self.loss.name != "softmax":
            raise ConfigError(
                f'{kind} compares softmaxes, and loss.name is "{self.loss.name}"; set loss.name = "softmax"'
            )
        if isinstance(model, ViTConfig) and model.distilled and objective.alpha == 1:
            raise ConfigError(
                "objective.alpha 1.0 leaves the head of the class token untrained; use less, like 0.5, or "
                "model.distilled = false"
            )

    def _check_masked_patches(self, objective: MaskedPatchesConfig) -> None:
        kind, model = 'objective.kind = "masked_patches"', self.model
        if not isinstance(model, ViTConfig) or model.kind != "vit":
            raise ConfigError(
                f'{kind} needs model.kind = "vit": a model of another kind has no patches of pixels'
            )
        patch = model.resolved_patch_size
        if math.prod(model.grid) < 2:
            raise ConfigError(
                f"{kind} needs two patches or more, and model.image_size {written(model.image_size)} has one "
                f"of {patch} pixels; use a larger image or smaller patches"
            )
        if objective.target == "downsized_patch" and patch % DOWNSIZED:
            raise ConfigError(
                f'objective.target = "downsized_patch" needs a patch size that is a multiple of {DOWNSIZED}, '
                f'not {patch}; use another variant, or target = "mean_color"'
            )
        outputs = objective.num_outputs(patch)
        if model.num_patch_outputs != outputs:
            raise ConfigError(
                f"model.num_patch_outputs is {model.num_patch_outputs}, but objective.target = "
                f'"{objective.target}" needs {outputs}; set model.num_patch_outputs = {outputs}'
            )
        for name, value in {"num_classes": 0, "representation_size": 0}.items():
            if getattr(model, name) != value:
                raise ConfigError(
                    f"model.{name} {getattr(model, name)} makes a layer that {kind} does not train; "
                    f"set model.{name} = {value}"
                )
        if model.distilled:
            raise ConfigError(f"model.distilled = true makes a token for a teacher, and {kind} has none")
        if model.pool == "map":
            raise ConfigError(
                f'model.pool = "map" is not trained by {kind}, which looks at patch tokens alone; use '
                '"token" or "mean"'
            )
        for name in ("mixup", "cutmix"):
            if getattr(self.augment, name):
                raise ConfigError(f"augment.{name} mixes labels, and {kind} has none; leave it out")
        if self.loss != LossConfig() or self.data.labels != "single":
            key = "[loss]" if self.loss != LossConfig() else 'data.labels = "multi"'
            raise ConfigError(f"{key} is about labels, which {kind} does not read; leave it out")
        for name, section in self.evals.items():
            if isinstance(section, ClassifyConfig):
                raise ConfigError(
                    f'evals.{name} of kind "classify" scores a classifier, and {kind} trains none; use '
                    'kind = "fewshot" or "knn"'
                )

    def _check_judge(self) -> None:
        judge = self.checkpoint.keep_best
        name = judge.split("/")[1] if judge else ""
        if judge and name not in self.evals:
            raise ConfigError(
                f'checkpoint.keep_best "{judge}" names no evaluation of this run, which has '
                f"{', '.join(self.evals) or 'none'}; add [evals.{name}]"
            )

    def _check_validation(self) -> None:
        for name, section in self.evals.items():
            if isinstance(section, ClassifyConfig) and section.split and not self.data.validation_fraction:
                raise ConfigError(
                    f'evals.{name}.split = "{section.split}" needs samples that are not trained on; set '
                    "data.validation_fraction, to 0.1 for example, or name test shards: "
                    f"evals.{name}.split= evals.{name}.test=SHARDS"
                )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run.

        Raises ConfigError if its warmup and cooldown do not fit in, or the steps into 64 bits.
        """
        if self.total_epochs * steps_per_epoch >= 2**63:
            raise ConfigError(
                f"total_epochs {self.total_epochs:g} makes more steps than fit in 64 bits; lower it"
            )
        steps = (
            self.total_steps
            or self.total_samples // self.global_batch
            or round(self.total_epochs * steps_per_epoch)
        )
        if steps < 1:
            raise ConfigError(
                "the run has no whole step: its total is below one global_batch "
                f"of {self.global_batch:,} images; raise the total"
            )
        if self.schedule.warmup_steps >= steps:
            raise ConfigError(
                f"schedule.warmup_steps {self.schedule.warmup_steps:,} must be below "
                f"the run's {steps:,} steps; lower it, or set schedule.warmup_fraction, to 0.1 for example"
            )
        if self.schedule.warmup(steps) + self.schedule.cooldown_steps > steps:
            raise ConfigError(
                f"a warmup of {self.schedule.warmup(steps):,} steps and schedule.cooldown_steps "
                f"{self.schedule.cooldown_steps:,} do not fit into the run's {steps:,} steps; lower one"
            )
        return steps
