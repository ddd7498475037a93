"""What a study is, as a TOML file says it."""

import dataclasses
from typing import Any

from vitscale.errors import ConfigError
from vitscale.study.paper import TABLE6


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyModel:
    """A model of a study ([[models]]).

    name:       in tables and plots; its folder is called after it
    config:     the TOML file of its run
    overrides:  KEY=VALUE in place of what that says
    recipes:    fine-tunings of it alone, by name, as in the study
    line:       the line of the plot against data that it is a point of; "" = its name
    series:     the lines of the plot against compute that it is a point of; if no model has
                any, that plot has no lines
    paper:      its row of the paper's Table 6 (vitscale/study/paper.py); "" = none
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    recipes: dict[str, str] = dataclasses.field(default_factory=dict)
    line: str = ""
    series: tuple[str, ...] = ()
    paper: str = ""

    def __post_init__(self) -> None:
        if self.paper and self.paper not in TABLE6:
            raise ConfigError(
                f'models: {self.name} has paper = "{self.paper}", which is no row of Table 6; '
                f"those are {', '.join(TABLE6)}"
            )

    @property
    def resolved_line(self) -> str:
        return self.line or self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: each of its models on each fraction, by each seed and each value of the sweep.

    out:        the folder of its runs
    models:     the models, each by a table ([[models]])
    metric:     what is plotted: "eval/NAME/NUMBER", a number that the runs log (with
                checkpoint.keep_best at the best step, otherwise at the last), or
                "finetune/RECIPE", the mean accuracy by a recipe
    choose_by:  the logged number by which a value of the sweep is chosen; "" = metric
    overrides:  KEY=VALUE for all models, in place of their own
    fractions:  of the data that models are trained on (data.fraction)
    seeds:      of the runs, each of which is another run
    sweep:      values of config keys ([sweep], "optim.lr" = [1e-3, 3e-3]); all combinations
    recipes:    fine-tunings of every chosen model, by name: config files with [finetune]
    """

    out: str
    models: tuple[StudyModel, ...]
    metric: str
    choose_by: str = ""
    overrides: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    sweep: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    recipes: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names:
            raise ConfigError("models is empty; name one in a table [[models]]")
        if len(set(names)) < len(names):
            raise ConfigError(f"models have the names {', '.join(names)}; give each a different name")
        for key in ("fractions", "seeds"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; leave it out for one run of each model")
        for key, values in self.sweep.items():
            if not values:
                raise ConfigError(f"sweep.{key} is empty; leave it out")
        kind, _, name = self.metric.partition("/")
        if kind == "finetune":
            for model in self.models:
                if name not in self.recipes_of(model):
                    raise ConfigError(
                        f'metric "{self.metric}" names no recipe of {model.name}, which has '
                        f"{', '.join(self.recipes_of(model)) or 'none'}"
                    )
            if not self.choose_by and self.sweep:
                raise ConfigError(
                    'choose_by is missing: the sweep needs a number that the runs log, like "eval/val/top1"'
                )
        elif not _is_logged(self.metric):
            raise ConfigError(
                f'metric "{self.metric}" is neither a logged number, like "eval/val/top1", nor '
                '"finetune/RECIPE"'
            )
        if self.choose_by and not _is_logged(self.choose_by):
            raise ConfigError(f'choose_by "{self.choose_by}" is not a logged number, like "eval/val/top1"')

    def recipes_of(self, model: StudyModel) -> dict[str, str]:
        """The fine-tunings of one of the models, its own last."""
        return {**self.recipes, **model.recipes}

    @property
    def logged_metrics(self) -> list[str]:
        """Those numbers of the runs that the study needs."""
        return [name for name in dict.fromkeys((self.metric, self.choose_by)) if _is_logged(name)]

    @property
    def resolved_choose_by(self) -> str:
        return self.choose_by or self.metric


def _is_logged(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") == 2
