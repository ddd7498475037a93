"""VTAB-1k of a checkpoint: every task by a protocol, resumable, several at a time."""

import dataclasses
import functools
import glob
import json
from collections.abc import Callable
from pathlib import Path

import torch

from vitscale.errors import ConfigError, DataError, Diverged
from vitscale.finetune.protocols import PROTOCOLS, Setting, finetuning_config
from vitscale.finetune.runs import (
    ROOT,
    FineTuning,
    StartingPoint,
    check_overrides,
    check_unchanged,
    deviating,
    finetuned,
    keep_source,
    located,
    scored,
    tried,
)
from vitscale.finetune.scores import Scores
from vitscale.finetune.slots import Slots, done_line, in_slots
from vitscale.system import atomic
from vitscale.vtab.tasks import TASKS, TEST, TRAIN800, TRAIN800VAL200, VAL200, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class VtabConfig:
    """What is asked for.

    data: the folder with a folder of shards for each task, as `tools/data.py pack` makes them.
    protocol: a name of PROTOCOLS, or "linear": a linear probe of the frozen features.
    seeds: of the final fine-tuning, or of the probe; each gives an accuracy.
    overrides: KEY=VALUE for the configs of the runs.
    slots: how many processes at a time; 0 = one on each GPU.
    """

    checkpoint: str
    data: Path
    out: Path
    protocol: str = "paper"
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    slots: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"--tasks {','.join(unknown) or 'is empty'}: name some of {', '.join(TASKS)}")
        if self.overrides and self.protocol == "linear":
            raise ConfigError("--set changes fine-tunings; the protocol linear has none")
        check_overrides(self.overrides, {"run_dir": "--out", "seed": "--seeds", "init.checkpoint": "CKPT"})


def run(config: VtabConfig, said: Callable[[str], object] = print) -> Scores:
    """Do all tasks, or those that an earlier command has not done, and write the results.

    said: gets a line when a task is done, or one of its settings has diverged. Raises
    ConfigError, DataError or CheckpointError before anything is trained, where something is
    missing, and Diverged for a task without a result.
    """
    start = located(config.checkpoint)
    others = [edition for name in config.tasks for edition in editions(config, name)]
    deviations = [*deviating(config.overrides), *others]
    with Slots(config.slots) as slots:
        actions = {
            name: functools.partial(score, config, TASKS[name], start, slots, said) for name in config.tasks
        }
        try:
            accuracies = dict(zip(actions, in_slots(actions, slots, said), strict=True))
        except Diverged as error:
            way_out = f"lower optim.lr by --set, and delete {config.out} or name another --out"
            raise Diverged(f"{error}; {way_out}") from None
    scores = Scores(
        checkpoint=start.path,
        protocol=config.protocol,
        accuracies={name: accuracies[name] for name in TASKS if name in accuracies},
        deviations=tuple(deviations),
    )
    write(scores, config.out)
    return scores


def write(scores: Scores, out: Path) -> None:
    """Write results.json, results.md and, where matplotlib is installed, results.png."""
    atomic.write(out / "results.json", (json.dumps(scores.to_json(), indent=2) + "\n").encode())
    atomic.write(out / "results.md", scores.markdown().encode())
    try:
        scores.draw(out / "results.png")
    except ImportError:
        (out / "results.png").unlink(missing_ok=True)


def score(
    config: VtabConfig,
    task: Task,
    start: StartingPoint,
    slots: Slots,
    said: Callable[[str], object] = print,
) -> list[float]:
    """The accuracies on a task's test images, one for each seed."""
    folder, data = config.out / task.name, (config.data / task.name).absolute()
    if config.protocol == "linear":
        return [_probe(config, task, start, seed, slots) for seed in config.seeds]
    protocol = PROTOCOLS[config.protocol]

    def tuning(setting: Setting, fit_on: str, test: str, seed: int, name: str) -> FineTuning:
        values = finetuning_config(
            protocol,
            setting,
            task,
            checkpoint=start.path,
            model=start.model,
            index=str(data / f"{fit_on}.index.json"),
            run_dir=str((folder / name / "run").absolute()),
            seed=seed,
            precision="bf16" if torch.cuda.is_available() else "fp32",
        )
        images = ("--data", f"{glob.escape(str(data))}/{test}-*.tar", "--crop", "resize")
        return FineTuning(
            folder=folder / name, start=start, values=values, overrides=config.overrides, score=images
        )

    best = protocol.settings[0]
    if len(protocol.settings) > 1:
        found: dict[Setting, float] = {}
        for setting in protocol.settings:
            attempt = tuning(setting, TRAIN800, VAL200, config.seeds[0], f"sweep-{setting}")
            accuracy = tried(attempt, slots)
            if accuracy is None:
                said(done_line(str(attempt.folder), [None]))
            else:
                found[setting] = accuracy
        if not found:
            raise Diverged(f"{folder}: the runs of all settings have diverged")
        best = max(found, key=lambda setting: found[setting])
    finals = [tuning(best, TRAIN800VAL200, TEST, seed, f"final-seed{seed}") for seed in config.seeds]
    return [finetuned(final, slots) for final in finals]


def _probe(config: VtabConfig, task: Task, start: StartingPoint, seed: int, slots: Slots) -> float:
    data = glob.escape(str((config.data / task.name).absolute()))
    folder = config.out / task.name / f"linear-seed{seed}"
    options = (
        *("--train", f"{data}/{TRAIN800VAL200}-*.tar", "--test", f"{data}/{TEST}-*.tar", "--crop", "resize"),
        # A fifth of the 1,000 chooses the learning rate.
        *("--dev-fraction", "0.2", "--seed", str(seed)),
    )
    if not (folder / "source.json").exists():  # of an earlier version, and nothing names its weights
        (folder / "result.json").unlink(missing_ok=True)
    keep_source(folder, start, options)
    if not (folder / "result.json").exists():
        check_unchanged(start)
    evaluate = (ROOT / "tools" / "evaluate.py", "linear", start.path)
    return scored(folder, (*evaluate, *options, "--cache", config.out / "features"), slots)


def editions(config: VtabConfig, name: str) -> list[str]:
    """What the packing of a task says of its members, if they are not the published ones.

    Raises DataError if the task was not packed.
    """
    folder = config.data / name
    missing = [
        part for part in (TRAIN800, VAL200, TRAIN800VAL200, TEST) if not list(folder.glob(f"{part}-*.tar"))
    ]
    if missing:
        raise DataError(
            f"{folder} holds no {missing[0]}-*.tar; make it with: python tools/data.py pack SOURCE {folder} "
            f"--format vtab/{name}, or leave the task out with --tasks"
        )
    try:
        edition = json.loads((folder / "pack-report.json").read_bytes()).get("edition", "")
        return [edition] if "not the published split" in edition or not edition else []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"{name}: nothing says which images these are"]
