"""One set of numbers a logged step, rendered to metrics.jsonl, TensorBoard and the console.

metrics.jsonl holds one JSON object a row, {"step": 50, "train/loss": 2.1, ...}. Floats are written with the
fewest digits that read back to the same value, so two runs compare bit for bit. JSON has no NaN: it and the
infinities are written as the strings "nan", "inf" and "-inf", which read_metrics turns back into floats.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from vitscale import storage

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
NON_FINITE = ("nan", "inf", "-inf")
# What the console shows of the numbers, where a step has them: name, label, format.
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
    """Writes a run's numbers; only rank 0 makes one. Each row leaves the process at once: a kill loses none.

    resume_step: the step of the checkpoint that training goes on from, 0 for a fresh start. What an earlier
    process wrote past it, and a last row torn by a kill, is dropped, so that each step stands once.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, resume_step: int, total_steps: int, tensorboard: bool = True
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trim_metrics(folder / FILE_NAME, resume_step)
        self._file = open(folder / FILE_NAME, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard = _open_tensorboard(folder / "tensorboard", resume_step) if tensorboard else None
        # A log file full of carriage returns helps nobody: the bar is for terminals alone.
        self._bar = _open_bar(resume_step, total_steps) if sys.stderr.isatty() else None
        self._total_steps, self._first_step, self._start = total_steps, resume_step, time.monotonic()

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Record the numbers of a step everywhere."""
        row = {"step": step, **{name: _plain(value) for name, value in numbers.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        self._show(step, numbers)

    def write_images(self, tag: str, images: UInt8[Tensor, "B 3 H W"], step: int = 0) -> None:
        """Show images as one grid in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_images(tag, images, step)
            self._tensorboard.flush()

    def write_hparams(self, values: Mapping[str, Any]) -> None:
        """Show a resolved config, nested tables as dotted names, as hyperparameters in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_hparams(_flatten(values), {}, run_name=".")

    def close(self) -> None:
        """Finish the files and the bar."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()

    def _show(self, step: int, numbers: Mapping[str, float | int]) -> None:
        text = _console_text(numbers)
        if self._bar is None:
            logger.info("step %d/%d  %s  eta %s", step, self._total_steps, text, self._remaining(step))
        elif any(name in numbers for name, _, _ in CONSOLE):
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._bar.write(f"step {step}/{self._total_steps}  {text}", file=sys.stderr)

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._start) / done * max(0, self._total_steps - step)
        return tqdm.format_interval(round(seconds))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, without a last one that is half written or torn by a kill."""
    rows = (_parse(line) for line in Path(path).read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def trim_metrics(path: Path, resume_step: int) -> None:
    """Drop the rows past `resume_step` (0: all) and torn ones, atomically."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (row := _parse(line)) is not None and 0 < resume_step >= row["step"]]
    if len(kept) < len(lines):
        logger.info("%s: dropped %d rows past step %d", path, len(lines) - len(kept), resume_step)
        storage.write_atomic(path, b"".join(kept))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A row, or None if it is torn: a whole one ends in a newline."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {name: float(value) if value in NON_FINITE else value for name, value in row.items()}


def _plain(value: float | int) -> float | int | str:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _console_text(numbers: Mapping[str, float | int]) -> str:
    shown = [f"{label} {form.format(numbers[name])}" for name, label, form in CONSOLE if name in numbers]
    # A row without training numbers is an evaluation: all of it matters.
    return "  ".join(shown or [f"{name} {value:.4g}" for name, value in numbers.items()])


def _open_tensorboard(folder: Path, resume_step: int) -> SummaryWriter:
    """purge_step makes TensorBoard forget what earlier processes wrote from that step on."""
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)


def _open_bar(resume_step: int, total_steps: int) -> "tqdm[Any]":
    return tqdm(initial=resume_step, total=total_steps, unit="step", file=sys.stderr, dynamic_ncols=True)


def _flatten(values: Mapping[str, Any], where: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{where}{key}."))
        else:
            flat[f"{where}{key}"] = (
                value if isinstance(value, bool | int | float | str) else json.dumps(value)
            )
    return flat
