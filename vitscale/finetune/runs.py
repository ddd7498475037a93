"""Fine-tunings in folders of their own: trained, scored, and never done twice.

    FOLDER/config.toml    what is trained
    FOLDER/source.json    from which weights, and what it is scored on
    FOLDER/run/           the run; a killed one is resumed, one that diverged is not
    FOLDER/log            what both processes printed
    FOLDER/result.json    the score, written last
    FOLDER/on-NAME/       source.json, log and result.json of a further test set

Each runs in processes of its own, so that several share the GPUs or cores of one machine.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale.checkpoint.manifest import MANIFEST
from vitscale.errors import CheckpointError, ConfigError, Diverged, UserError
from vitscale.evals.store import digest_of, model_digest
from vitscale.finetune.slots import PYTHON, Score, Slots, in_slots
from vitscale.guard import ending
from vitscale.models import ModelConfig
from vitscale.run_dir.directory import saved_config_at
from vitscale.stores import storage
from vitscale.system import atomic
from vitscale.train_config import TrainConfig
from vitscale.weights.files import find_export
from vitscale.weights.saved import SavedModel

ROOT = Path(__file__).resolve().parents[2]
# Sections that leave results as they are up to rounding, so that a repeated command may change
# them; but checkpoint.keep_best chooses what counts.
FREE_SECTIONS = ("engine", "log", "checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """The weights that all runs and probes of a command start from.

    named: the run, step directory or export that the user named, absolute. path: the step
    directory or export that it was then. model: its config. weights: digest_of them.
    version: of the file there that is replaced whenever they are (_version).
    """

    named: str
    path: str
    step: int
    model: ModelConfig
    weights: str
    version: str

    def __str__(self) -> str:
        return self._named(f"model {model_digest(self.weights, self.model)}")

    @property
    def in_earlier_versions(self) -> str:
        """As they wrote it, by its weights alone."""
        return self._named(f"weights {self.weights}")

    def _named(self, digest: str) -> str:
        return f"{storage.without_query(self.path)} (step {self.step:,}, {digest})"


def located(checkpoint: str) -> StartingPoint:
    """What a run, a step directory or an export is at this moment; all of its weights are read.

    A live run saves newer checkpoints, and an export may be replaced. Raises CheckpointError.
    """
    saved = SavedModel(checkpoint)
    version = _version(saved.path)  # before the weights are read
    return StartingPoint(
        named=storage.absolute(checkpoint),
        path=storage.absolute(saved.path),
        step=saved.step,
        model=saved.config,
        weights=digest_of(saved.tensors()),
        version=version,
    )


def check_unchanged(start: StartingPoint) -> None:
    """Raise CheckpointError if other weights are now where a command starts from.

    What is about to be done is then not what source.json says. Weights that were copied anew
    are read again.
    """
    if _version(start.path) != start.version and str(located(start.path)) != str(start):
        raise CheckpointError(
            f"{storage.without_query(start.path)} holds other weights than when this command began; put back "
            f"those of step {start.step:,}, or name another --out to start from the new ones"
        )


def _version(path: str) -> str:
    """What changes when a step directory or an export is replaced."""
    return storage.versions([find_export(path) or storage.child(path, MANIFEST)])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """One run, and what scores it.

    start: whose path is `values["init"]["checkpoint"]`. overrides: KEY=VALUE of the user.
    score: what `tools/evaluate.py classify` scores, as its options:
    ("--data", "/data/cifar10/test-*.tar").
    """

    folder: Path
    start: StartingPoint
    values: Mapping[str, Any]
    overrides: Sequence[str]
    score: Sequence[str]

    def config(self) -> TrainConfig:
        """Raises ConfigError for overrides that do not fit."""
        return configs.resolve(TrainConfig, [self.values], self.overrides)


def finetuned(tuning: FineTuning, slots: Slots) -> float:
    """The top-1 accuracy of a fine-tuning, which is done unless it was.

    Raises ConfigError if its folder holds another one, or its score on other images, Diverged
    as train does, and UserError if a process failed.
    """
    folder = tuning.folder
    config = _as_begun(folder, tuning.config(), tuning.start)
    keep_config(folder, config)
    if config.init.checkpoint == tuning.start.path:  # else nothing says from which step it began
        keep_source(folder, tuning.start, tuning.score)
    if not (folder / "result.json").exists():
        check_unchanged(tuning.start)
        train(folder, slots)
    return scored(folder, _classify(config, tuning.score), slots)


def folder_on(tuning: FineTuning, test_set: str) -> Path:
    """Of what a fine-tuning scores on a further test set."""
    return tuning.folder / f"on-{test_set}"


def scored_on(tuning: FineTuning, slots: Slots, test_set: str, score: Sequence[str]) -> float:
    """The top-1 accuracy of a fine-tuning that is done on a further test set, found once.

    score: as FineTuning.score. Raises ConfigError if the folder holds a score on other images,
    and UserError if the process failed.
    """
    folder = folder_on(tuning, test_set)
    keep_source(folder, None, score)
    return scored(folder, _classify(tuning.config(), score), slots)


def _classify(config: TrainConfig, score: Sequence[str]) -> list[str | Path]:
    """The command that scores a run, by the average of its weights where it keeps one."""
    command = [ROOT / "tools" / "evaluate.py", "classify", config.run_dir, *score]
    if config.optim.ema_decay:
        command.append("--ema")
    return [*command, "--batch-size", _batch_size(config)]


def train(folder: Path, slots: Slots, launcher: Sequence[str] = PYTHON) -> None:
    """Train the run of a folder's config.toml to its end.

    Raises Diverged if it diverges, or did in an earlier command, and UserError if it fails
    otherwise.
    """
    _check_finite(folder)
    try:
        _run(slots, [ROOT / "launch" / "train.py", folder / "config.toml"], folder, launcher)
    except UserError:
        _check_finite(folder)
        raise


def _check_finite(folder: Path) -> None:
    if ending.has_diverged(folder / "run"):
        raise Diverged(f"{folder}: the run has diverged ({folder / 'log'})")


def tried(tuning: FineTuning, slots: Slots) -> float | None:
    """As finetuned, where the best of several counts: None = it has diverged."""
    try:
        return finetuned(tuning, slots)
    except Diverged:
        return None


def several(
    tunings: Sequence[FineTuning],
    slots: Slots,
    said: Callable[[str], object],
    one: Callable[[FineTuning, Slots], Score],
    folder_of: Callable[[FineTuning], Path] = operator.attrgetter("folder"),
) -> list[Score]:
    """What `one`, like finetuned, gives for each, as many at a time as there are slots.

    folder_of: where the score of each lies, which `said` is told.
    """

    def score(tuning: FineTuning) -> list[Score]:
        return [one(tuning, slots)]

    actions = {str(folder_of(tuning)): functools.partial(score, tuning) for tuning in tunings}
    return [value for (value,) in in_slots(actions, slots, said)]


def scored(folder: Path, command: Sequence[str | Path], slots: Slots) -> float:
    """The top-1 accuracy that a command of tools/evaluate.py finds, unless it has."""
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run(slots, [*command, "--json", result], folder)
    remedy = "delete it, and the same command scores again"
    return atomic.read_json(result, lambda values: float(values["results"]["top1"]), remedy)


def _batch_size(config: TrainConfig) -> str:
    """Of the scoring: what fits in training fits without gradients."""
    return str(min(256, config.engine.micro_batch or config.global_batch))


def is_free(key: str) -> bool:
    """Whether a dotted key may differ where a command is repeated, by FREE_SECTIONS.

    So may the number of processes that decode for an evaluation, and further test sets, which
    are scored in folders of their own.
    """
    section, _, rest = key.partition(".")
    if section == "finetune":
        return rest.partition(".")[0] == "test_sets"
    if section == "evals":
        return rest.endswith(".num_workers")
    return section in FREE_SECTIONS and key != "checkpoint.keep_best"


def deviating(overrides: Sequence[str]) -> list[str]:
    """Those of the user's KEY=VALUE that change results."""
    return [text for text in overrides if not is_free(text.partition("=")[0])]


def check_overrides(overrides: Sequence[str], owners: Mapping[str, str]) -> None:
    """Raise ConfigError for a KEY=VALUE whose key follows from something else: owners[key]."""
    for text in overrides:
        key = text.partition("=")[0]
        if key in owners:
            raise ConfigError(
                f"--set {text}: {key} follows from {owners[key]} here; leave it out, or change that instead"
            )


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Write the config.toml of a run's folder. Raises ConfigError if it holds another run."""
    path, text = folder / "config.toml", configs.to_toml(config)
    if path.exists():
        old, new = map(configs.to_dict, (saved_config_at(path, "another --out"), config))
        if keys := [key for key in configs.differing_keys(old, new) if not is_free(key)]:
            raise ConfigError(
                f"{path.parent} holds a run with other settings ({', '.join(keys)}); name another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(path, text.encode())


def _as_begun(folder: Path, config: TrainConfig, start: StartingPoint) -> TrainConfig:
    """The config, from the place that the folder's config names if an earlier version began it.

    Those wrote what the user named, a run, and not its step. Such a config that has led to
    nothing yet is deleted, so that this version's takes its place.
    """
    path = folder / "config.toml"
    if start.named == start.path or not path.exists():
        return config
    if saved_config_at(path, "another --out").init.checkpoint != start.named:
        return config
    if any((folder / name).exists() for name in ("result.json", "run")):
        return dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint=start.named))
    path.unlink()
    return config


def keep_source(folder: Path, start: StartingPoint | None, score: Sequence[str]) -> None:
    """Write what a folder's result comes from. Raises ConfigError if it holds another's.

    start: None where a folder around it says that. score: the options that say what is scored.
    A result of an earlier version has no source, and counts as it is.
    """
    path, source = folder / "source.json", {"evaluation": " ".join(score)}
    if start:
        source["checkpoint"] = str(start)
    if path.exists():
        remedy = f"name another --out, or delete it if {folder} is of the same checkpoint and test set"
        kept = atomic.read_json(path, lambda values: {key: values[key] for key in source}, remedy)
        for key, value in source.items():
            if kept[key] not in (value, start and start.in_earlier_versions):
                raise ConfigError(
                    f"{folder} holds results of another {key} ({kept[key]}, now {value}); "
                    "name another --out, or delete that folder"
                )
    elif not (folder / "result.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(path, (json.dumps(source, indent=1) + "\n").encode())


def _run(slots: Slots, command: Sequence[str | Path], folder: Path, launcher: Sequence[str] = PYTHON) -> None:
    """Run a command to its end. Raises UserError with its last error if it fails."""
    log = folder / "log"
    status = slots.run(command, log, launcher)
    if status:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = errors[-1] if errors else f"exit status {status}; its log says why"
        raise UserError(f"{folder}: {Path(command[0]).name} ended early: {reason} ({log})")
