"""A fine-tuning as in the paper's Table 4: dev images choose the rate, seeds repeat it."""

import dataclasses
import functools
import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from vitscale import config as configs
from vitscale.errors import ConfigError, Diverged, UserError
from vitscale.evals import ClassifyConfig
from vitscale.finetune.model import KEYS, tuned_model
from vitscale.finetune.runs import (
    FineTuning,
    check_overrides,
    deviating,
    finetuned,
    folder_on,
    located,
    scored_on,
    several,
    tried,
)
from vitscale.finetune.slots import Slots
from vitscale.models import ModelConfig
from vitscale.models.transfer import check_backbone, check_head
from vitscale.stores import storage
from vitscale.system import atomic
from vitscale.train_config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridResult:
    """Accuracies as fractions of 1.

    dev: by learning rate; empty if there was nothing to choose. diverged: the rates whose runs
    have none. accuracies: one for each seed. test_sets: the same on further test sets, by name.
    overrides: what the user changed of the recipe.
    """

    checkpoint: str
    recipe: str
    dev: dict[float, float]
    diverged: tuple[float, ...]
    learning_rate: float
    accuracies: tuple[float, ...]
    test_sets: dict[str, tuple[float, ...]]
    overrides: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["dev"] = {f"{rate:g}": accuracy for rate, accuracy in self.dev.items()}
        values["test_sets"] = {name: _summary(found) for name, found in self.test_sets.items()}
        return {**values, **_summary(self.accuracies)}

    def text(self) -> str:
        lines = [f"{self.checkpoint} by {self.recipe}"]
        lines += [f"  rate {rate:<8g} dev {100 * accuracy:.2f}%" for rate, accuracy in self.dev.items()]
        lines += [f"  rate {rate:<8g} diverged" for rate in self.diverged]
        for name, accuracies in [("test", self.accuracies), *self.test_sets.items()]:
            seeds = " ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
            mean, std = fmean(accuracies), pstdev(accuracies)
            score = f"{100 * mean:.2f} ± {100 * std:.2f}% ({seeds})"
            lines.append(f"  rate {self.learning_rate:<8g} {name} {score}")
        return "\n".join([*lines, *(f"Not the recipe: {text}" for text in deviating(self.overrides))])


def _summary(accuracies: Sequence[float]) -> dict[str, Any]:
    return {"accuracies": accuracies, "mean": fmean(accuracies), "std": pstdev(accuracies)}


def run(
    checkpoint: str,
    recipe: str,
    out: Path,
    overrides: Sequence[str] = (),
    count: int = 0,
    said: Callable[[str], object] = print,
) -> GridResult:
    """Do the whole protocol of a recipe, or what an earlier command has not done of it.

    recipe: a config file with [finetune] and an evaluation of kind "classify", whose images are
    the test set. count: processes at a time; 0 = one on each GPU. said: gets a line when a run
    is done. Raises ConfigError or CheckpointError before anything is trained, and Diverged if
    no learning rate can be chosen or a final run has diverged.
    """
    config, test = read(recipe, overrides)
    start = located(checkpoint)
    values = values_for(config, start.path, start.model)

    def tuning(name: str, rate: float, seed: int, dev_fraction: float) -> FineTuning:
        folder = out / name
        chosen = values | {"run_dir": str((folder / "run").absolute()), "seed": seed}
        chosen["optim"] = values["optim"] | {"lr": rate}
        chosen["data"] = values["data"] | {"validation_fraction": dev_fraction}
        mapped = ("--label-map", storage.absolute(test.label_map)) if test.label_map else ()
        on_test = ("--data", absolute_pattern(test.test), "--crop", test.crop, *mapped)
        score = ("--split", "validation", "--crop", test.crop) if dev_fraction else on_test
        return FineTuning(folder=folder, start=start, values=chosen, overrides=(), score=score)

    section = config.finetune
    rates = section.learning_rates or (config.optim.lr,)
    try:
        with Slots(count) as slots:
            dev: dict[float, float] = {}
            if len(rates) > 1:
                tries = [
                    tuning(f"lr{rate:g}", rate, section.seeds[0], section.dev_fraction) for rate in rates
                ]
                scores = zip(rates, several(tries, slots, said, tried), strict=True)
                dev = {rate: score for rate, score in scores if score is not None}
                if not dev:
                    raise Diverged(f"{out}: the runs of all learning rates have diverged")
            best = max(dev or rates, key=lambda rate: dev.get(rate, 0.0))
            finals = [tuning(f"final-seed{seed}", best, seed, 0.0) for seed in section.seeds]
            accuracies = several(finals, slots, said, finetuned)
            test_sets, failure = _on_test_sets(section.test_sets, test.crop, finals, slots, said)
    except Diverged as error:
        key = "finetune.learning_rates" if section.learning_rates else "optim.lr"
        way_out = f"lower {key} in {recipe}, and delete {out} or name another --out"
        raise Diverged(f"{error}; {way_out}") from None
    result = GridResult(
        checkpoint=start.path,
        recipe=recipe,
        dev=dev,
        diverged=tuple(rate for rate in rates if dev and rate not in dev),
        learning_rate=best,
        accuracies=tuple(accuracies),
        test_sets=test_sets,
        overrides=tuple(overrides),
    )
    atomic.write(out / "results.json", (json.dumps(result.to_json(), indent=2) + "\n").encode())
    if failure:  # of a test set
        said(f"{result.text()}\nIn {out}: results.json, with all but the test set that failed")
        raise failure
    return result


def _on_test_sets(
    indexes: Mapping[str, str],
    crop: str,
    finals: Sequence[FineTuning],
    slots: Slots,
    said: Callable[[str], object],
) -> tuple[dict[str, tuple[float, ...]], UserError | None]:
    """The accuracies of the final runs on further test sets, and why one has none."""
    found: dict[str, tuple[float, ...]] = {}
    try:
        for name, index in indexes.items():
            if not index:
                continue
            folder_of = functools.partial(folder_on, test_set=name)
            is_done = all((folder_of(final) / "result.json").exists() for final in finals)
            if is_done or storage.sizes([index]) != [None]:
                score = ("--data", storage.absolute(index), "--crop", crop)
                one = functools.partial(scored_on, test_set=name, score=score)
                found[name] = tuple(several(finals, slots, said, one, folder_of))
            else:
                said(f"{name} is not scored: {index} is missing; pack it, and the same command scores it")
    except UserError as error:
        return found, error
    return found, None


def absolute_pattern(pattern: str) -> str:
    """As storage.absolute, for shards: `*?[` in the working directory's name are text."""
    if "://" in pattern or os.path.lexists(pattern):
        return storage.absolute(pattern)
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))


def read(recipe: str, overrides: Sequence[str] = ()) -> tuple[TrainConfig, ClassifyConfig]:
    """A recipe, and the section of its test set.

    Raises ConfigError for one that cannot be done.
    """
    config = configs.load(TrainConfig, [recipe], overrides)
    test = next((e for e in config.evals.values() if isinstance(e, ClassifyConfig) and e.test), None)
    if test is None:
        raise ConfigError('the recipe has no [evals.NAME] of kind "classify" with test shards to score')
    if config.init.full_state:
        raise ConfigError(
            "the recipe's init.full_state continues a run, and a fine-tuning is a new one: leave it out"
        )
    check_overrides(overrides, _owners(config, overrides))
    return config, test


def _owners(recipe: TrainConfig, overrides: Sequence[str]) -> dict[str, str]:
    """What sets those keys of a fine-tuning that are not the recipe's to set."""
    keys = [text.partition("=")[0] for text in overrides]
    return {
        "run_dir": "--out",
        "seed": "finetune.seeds",
        "data.validation_fraction": "finetune.dev_fraction",
        "init.checkpoint": "CKPT",
        "checkpoint.keep_best": "the protocol, by which the last step is scored,",
        **({"optim.lr": "finetune.learning_rates"} if recipe.finetune.learning_rates else {}),
        **{key: "CKPT" for key in keys if key.startswith("model.") and key[len("model.") :] not in KEYS},
    }


def values_for(recipe: TrainConfig, checkpoint: str, model: ModelConfig) -> dict[str, Any]:
    """The config of a training by a recipe that starts from a checkpoint with this model.

    Raises ConfigError if they do not fit each other.
    """
    values = configs.to_dict(recipe) | {"evals": {}, "expect": {}}
    values["checkpoint"] = values["checkpoint"] | {"keep_best": ""}
    values["init"] = {
        "checkpoint": storage.absolute(checkpoint),
        "ema": recipe.init.ema,
        "head": recipe.init.head,
    }
    values["model"] = configs.to_dict(tuned_model(model, dataclasses.asdict(recipe.model)))
    tuned = configs.from_dict(TrainConfig, values)
    check_backbone(model, tuned.model)
    if tuned.init.head:
        check_head(model, tuned.model)
    return values
