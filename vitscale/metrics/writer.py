"""Writes the numbers of each logged step to metrics.jsonl, TensorBoard and the console.

A row of metrics.jsonl is one JSON object:

    {"step": 50, "train/loss": 2.1, ...}

Floats have the fewest digits that read back to the same value, so two runs compare bit for bit.
JSON has no NaN: it and the infinities are written as the strings "nan", "inf" and "-inf", which
rows.py turns back into floats.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from vitscale.metrics.expect import Expectations, ExpectConfig
from vitscale.metrics.rows import each_row, tail_start, trim_metrics
from vitscale.redaction import redact
from vitscale.system import atomic

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
NO_EXPECTATIONS = ExpectConfig()
DIGEST = "data/digest"
EVENTS = "events.out.tfevents."  # then the time in seconds, the host and the process
# Ends of names in eval/ that are no results: sizes, spreads, and what a probe chose.
NOT_SCORES = ("/num_samples", "_std", "/c", "/learning_rate")
HASHES = (DIGEST,)  # in metrics.jsonl only: a curve of them means nothing
# TensorBoard sorts groups by name and opens the first two. There, their names are numbered.
GROUPS = ("train", "eval", "data", "perf", "time", "checkpoint", "goodput", "run", "loader", "learned")
# The numbers that the console shows, if a step has them: name, label, format.
CONSOLE = (
    ("epoch", "epoch", "{:.2f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/lr", "lr", "{:.2e}"),
    ("perf/images_per_second", "img/s", "{:,.0f}"),
    ("perf/mfu", "mfu", "{:.1%}"),
    ("time/data_wait_fraction", "data wait", "{:.1%}"),
    ("perf/memory_gib", "mem", "{:.1f} GiB"),
)


class MetricsWriter:
    """Writes a run's numbers; only rank 0 makes one. Each row is flushed, so a kill loses none.

    resume_step: the step of the checkpoint that training continues from, 0 for a fresh start.
    Rows that an earlier process wrote past it are dropped, and so is a last row torn by a kill,
    so that each step appears once. If the first step that is done again reads the same data, a
    line says whether it has the loss of the dropped row.
    judge: the number of an evaluation by which steps are compared (best_of); "" = none.
    expect: when the verdict on one of its metrics changes, a line says so.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        resume_step: int,
        total_steps: int,
        tensorboard: bool = True,
        judge: str = "",
        expect: ExpectConfig = NO_EXPECTATIONS,
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        dropped = trim_metrics(folder / FILE_NAME, resume_step)
        # By step: rows that this process will write again.
        self._before = {row["step"]: row for row in dropped if "train/loss" in row}
        self._path = folder / FILE_NAME
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard = _open_tensorboard(folder / "tensorboard", resume_step) if tensorboard else None
        self._console = _Console(resume_step, total_steps)
        self._resume_step = resume_step
        self._evaluations: dict[str, None] = {}  # the names of their numbers, in order
        self._at_resume, self._judge = set[str](), judge
        self._scores: dict[int, float] = {}  # of the judge, by step
        self._expectations = Expectations(expect)
        for row in each_row(self._path, start=tail_start(self._path, resume_step)):
            self._at_resume |= row.keys() if row["step"] == resume_step else set()
        compared = [name for name in (judge, *self._expectations.verdicts) if name]
        for row in each_row(self._path, names=compared) if compared else ():
            if judge in row:
                self._scores[row["step"]] = row[judge]
            self._expectations.add(row["step"], row)

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Write the numbers of a step to all three."""
        row = {"step": step, **{name: _json_number(value) for name, value in numbers.items()}}
        if self._judge in numbers:
            self._scores[step] = numbers[self._judge]
        with atomic.named(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in numbers.items():
                if name not in HASHES:
                    self._tensorboard.add_scalar(tensorboard_tag(name), value, step)
            self._tensorboard.flush()
        if step in self._before and "train/loss" in numbers:
            self._compare(step, numbers)
        self._evaluations |= dict.fromkeys(name for name in numbers if name.startswith("eval/"))
        self._console.show(step, numbers)
        for sentence in self._expectations.add(step, numbers):
            logger.info("%s", sentence)

    def conclude(self) -> None:
        """Say how the metrics stand beside what the config expects of them."""
        for sentence in self._expectations.sentences():
            logger.info("%s", sentence)

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The step that the judge finds best, the first of equals; None if it judged none."""
        return best_step({step: self._scores[step] for step in steps if step in self._scores}, self._judge)

    def is_best(self, step: int) -> bool:
        """Whether a step is better than all before it; the untrained model does not count."""
        return self.best_of([other for other in self._scores if other]) == step

    def without(self, evaluations: Sequence[str]) -> list[str]:
        """Those evaluations that have no numbers at the step where this start begins."""
        written = {name.split("/")[1] for name in self._at_resume if name.startswith("eval/")}
        return [name for name in evaluations if name not in written]

    def write_images(self, tag: str, images: UInt8[Tensor, "B 3 H W"], step: int = 0) -> None:
        """Show images in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_images(tensorboard_tag(tag), images, step)
            self._tensorboard.flush()

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Show texts in TensorBoard, as they are, at the step where this start begins."""
        if self._tensorboard is not None:
            for tag, text in texts.items():
                self._tensorboard.add_text(tag, f"```\n{redact(text)}\n```", self._resume_step)
            self._tensorboard.flush()

    def write_hparams(self, values: Mapping[str, Any]) -> None:
        """Show a resolved config in TensorBoard, with dotted names for nested tables.

        Its table also has the training loss and the evaluations that were written so far.
        TensorBoard takes them from the curves, so they are always those of the last step.
        """
        if self._tensorboard is not None:
            tags = map(tensorboard_tag, ("train/loss_mean", *self._evaluations))
            experiment, session, _ = hparams(_flatten(values), dict.fromkeys(tags, 0.0))
            for summary in (experiment, session):
                self._tensorboard._get_file_writer().add_summary(summary)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the files and the bar."""
        self._console.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        with atomic.named(self._path):  # it writes what the disk has refused before
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Say once whether the first repeated step has the loss that it had before."""
        row, self._before = self._before[step], {}
        before, loss = row["train/loss"], numbers["train/loss"]
        if row.get(DIGEST) != numbers.get(DIGEST):
            return  # a roll-back has passed over these data, or a kill made the run forget that it had
        if loss == before or (math.isnan(loss) and math.isnan(before)):
            logger.info("step %d was done before, with the same loss", step)
        else:
            logger.info(
                "step %d was done before, with the loss %.6g: now it differs by %.1e",
                step,
                before,
                loss - before,
            )


class _Console:
    """Shows rows on a bar, or as lines of the log with the time that is left."""

    def __init__(self, resume_step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        # Only on a terminal: in a log file, a bar is one long line full of carriage returns.
        self._bar = _open_bar(resume_step, total_steps) if sys.stderr.isatty() else None
        self._first: tuple[int, float] | None = None  # step and time of the first row with a loss

    def show(self, step: int, numbers: Mapping[str, float | int]) -> None:
        text = _console_text(numbers)
        if not text:
            return
        if self._bar is None:
            # What comes before the first row includes warming up or compiling.
            if self._first is None and "train/loss" in numbers:
                self._first = step, time.monotonic()
            logger.info("step %d/%d  %s  eta %s", step, self._total_steps, text, self._eta(step))
        elif any(name in numbers for name, _, _ in CONSOLE):
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._bar.write(f"step {step}/{self._total_steps}  {text}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        first, since = self._first or (step, now)
        return remaining_time(now - since, step - first, self._total_steps - step)


class SilentWriter(MetricsWriter):
    """Takes the place of a MetricsWriter on ranks other than 0, and writes nothing."""

    def __init__(self) -> None:
        self._tensorboard, self._expectations = None, Expectations(NO_EXPECTATIONS)

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        pass

    def close(self) -> None:
        pass


def tensorboard_tag(name: str) -> str:
    """The name of a number or image in TensorBoard, where its group has a place in the order.

    Examples: "train/loss" is "1_train/loss". Names without a group are of the data:
    "epoch" is "3_data/epoch".
    """
    group = name.split("/")[0] if "/" in name else "data"
    place = f"{GROUPS.index(group) + 1}_" if group in GROUPS else ""
    return f"{place}{group}/{name.removeprefix(f'{group}/')}"


def remaining_time(elapsed_seconds: float, num_done: int, num_left: int) -> str:
    """How long the steps that are left take at the pace of those done, as "12:34" or "1:02:03".

    Example: 4 steps done in 10 s and 100 left make 250 s, "04:10". "?" while none is done.
    """
    if num_done <= 0:
        return "?"
    return tqdm.format_interval(round(elapsed_seconds / num_done * max(0, num_left)))


def is_score(name: str) -> bool:
    """Whether a metric is a result of an evaluation."""
    return name.startswith("eval/") and not name.endswith(NOT_SCORES)


def best_step(scores: Mapping[int, float], judge: str) -> int | None:
    """The step whose score is best, the first of equals; None if no score is finite.

    judge: the name of the scores. Of a loss the lowest is best, of anything else the highest.
    """
    known = [step for step in sorted(scores) if math.isfinite(scores[step])]
    sign = -1 if judge.endswith("loss") else 1
    return max(known, key=lambda step: sign * scores[step]) if known else None


def _json_number(value: float | int) -> float | int | str:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _console_text(numbers: Mapping[str, float | int]) -> str:
    """Of a step, the numbers of CONSOLE; of an evaluation, all; "" for others, as of a save."""
    texts = [f"{label} {form.format(numbers[name])}" for name, label, form in CONSOLE if name in numbers]
    scores = [f"{name} {value:.4g}" for name, value in numbers.items() if name.startswith("eval/")]
    return "  ".join(texts or scores)


def _open_tensorboard(folder: Path, resume_step: int) -> SummaryWriter:
    """With purge_step, TensorBoard ignores what earlier processes wrote from that step on.

    It reads files by rising name, and so by the time at which each was begun: those of a clock
    that was ahead of this one get an earlier time, in the same order.
    """
    limit = int(time.time())
    for path in sorted(folder.glob(f"{EVENTS}{'[0-9]' * 10}.*"), reverse=True):
        stamp, _, rest = path.name.removeprefix(EVENTS).partition(".")
        if int(stamp) >= limit:
            path.rename(path.with_name(f"{EVENTS}{limit - 1:010d}.{rest}"))
        limit = min(int(stamp), limit - 1)
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)


def _open_bar(resume_step: int, total_steps: int) -> "tqdm[Any]":
    return tqdm(initial=resume_step, total=total_steps, unit="step", file=sys.stderr, dynamic_ncols=True)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            is_number = isinstance(value, bool | int | float)
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{key}"] = value if is_number else redact(text)
    return flat
