"""What saving, loading and exporting cost, beside a raw write of the same bytes and beside DeepSpeed's own
checkpoints (`tools/bench.py checkpoint`).

Real ranks write and read a state of real size, at random values. What is compared is measured in turns, in
the same processes and rounds, and the ratios are medians of the rounds' ratios, since a disk's speed changes
from minute to minute. The page cache is warm in every load. What the steps of a training lose while a save is
under way is not measured.
"""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException

from vitscale.bench import ranks
from vitscale.bench.ranks import Figures, Layout
from vitscale.checkpoint.export import SavedModel
from vitscale.checkpoint.format import CheckpointError
from vitscale.config import ConfigError
from vitscale.models.vit import ModelConfig

CONVERSION = "deepspeed.checkpoint.ds_to_universal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointBench:
    """What is measured: a ViT of `variant`, saved by `ranks` at ZeRO 1; every figure is a median over
    `rounds`.

    folder: on the disk to measure; "" = a temporary one. deepspeed: measure its own checkpoints, too.
    """

    variant: str = "B/16"
    ranks: int = 2
    rounds: int = 5
    folder: str = ""
    deepspeed: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.rounds < 1:
            raise ConfigError("--ranks and --rounds must be above 0")
        if not _fits(self.ranks):
            raise ConfigError(
                f"--ranks {self.ranks} needs as many GPUs, and {torch.cuda.device_count()} are here; "
                "lower it, or set CUDA_VISIBLE_DEVICES to nothing, to measure on the CPU"
            )

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(variant=self.variant)

    @property
    def own(self) -> Layout:
        """The layout that saves, and to whose load the others are compared."""
        return Layout(self.ranks, 1)

    @property
    def others(self) -> list[Layout]:
        """Other numbers of ranks, as far as there are devices for them, and another ZeRO stage."""
        worlds = sorted({world for world in (1, 2, 2 * self.ranks) if world != self.ranks and _fits(world)})
        return [*(Layout(world, 1) for world in worlds), Layout(self.ranks, 3)]

    @property
    def elsewhere(self) -> Layout:
        """Where a checkpoint is taken to; the own layout, on a machine with one GPU."""
        return self.others[0] if len(self.others) > 1 else self.own


def _fits(world: int) -> bool:
    """Whether every rank of a world has a device of its own."""
    return not torch.cuda.is_available() or world <= torch.cuda.device_count()


def run(config: CheckpointBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything, in a folder that is removed at the end."""
    if config.folder:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=config.folder or None))
    try:
        progress("saving, beside raw writes")
        saves = ranks.start(
            config.ranks, ranks.measure_saves, config.model, 1, folder / "saves", config.rounds
        )
        runs = {}
        for layout in (config.own, *config.others):
            progress(f"a checkpoint of {layout}")
            runs[str(layout)] = folder / str(layout)
            ranks.start(layout.world, ranks.write_checkpoint, config.model, layout.stage, runs[str(layout)])
        readers = (config.own, config.elsewhere, config.others[-1])
        loads = {str(reader): _loads(config, reader, runs, progress) for reader in dict.fromkeys(readers)}
        progress("exporting")
        results = {
            "model": config.variant,
            "layout": str(config.own),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "megabytes": saves["bytes"][0] / 1e6,
            **_saving(saves),
            **{f"load on {reader}, of a checkpoint by": figures for reader, figures in loads.items()},
            "export": _exports(runs[str(config.own)], folder),
        }
        if config.deepspeed:
            results["DeepSpeed's own checkpoints"] = _deepspeed(config, folder / "deepspeed", progress)
            _compare(config, saves, loads, results)
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _saving(figures: Figures) -> dict[str, Any]:
    """The rows of saving. A raw write ends with fsync, a save with its commit."""
    megabytes, raw = figures["bytes"][0] / 1e6, [*figures["raw"][1:], *figures["raw_again"][1:]]
    ratios = _ratios(figures["raw"], figures["writing"])
    return {
        "saving": {
            "raw write and fsync, MB/s": megabytes / median(raw),
            "save behind training, MB/s": megabytes / _median(figures["writing"]),
            "save in the foreground, MB/s": megabytes / _median(figures["foreground"]),
            "save / raw": median(ratios),
            "save / raw, every round": " ".join(f"{ratio:.2f}" for ratio in ratios),
            "best save / best raw": min(raw) / min(figures["writing"][1:]),
            "foreground / raw": median(_ratios(figures["raw_again"], figures["foreground"])),
            "raw write without its fsync, share": median(_ratios(figures["raw_write"], figures["raw"])),
            "checksum alone / save": median(_ratios(figures["checksum"], figures["writing"])),
        },
        "blocked": {
            "whole save, seconds": _median(figures["save"]),
            "training blocked, seconds": _median(figures["blocked"]),
            "training blocked, seconds, first save": figures["blocked"][0],
            "blocked / whole save": median(_ratios(figures["blocked"], figures["save"])),
            "in the foreground, seconds": _median(figures["foreground"]),
        },
    }


def _loads(
    config: CheckpointBench, reader: Layout, runs: Mapping[str, Path], progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """One reader, checkpoints of all layouts; the ratios are to the one of the reader's own layout."""
    progress(f"loading on {reader}")
    measured = ranks.start(reader.world, ranks.measure_loads, config.model, reader.stage, runs, config.rounds)
    totals = {
        name: [sum(pair) for pair in zip(figures["verify"], figures["restore"], strict=True)]
        for name, figures in measured.items()
    }
    rows = {}
    for name, figures in measured.items():
        rows[name] = {
            "verify, seconds": _median(figures["verify"]),
            "restore, seconds": _median(figures["restore"]),
            "both, seconds": _median(totals[name]),
        }
        if name != str(reader):
            rows[name]["both / same layout"] = median(_ratios(totals[name], totals[str(reader)]))
            same = measured[str(reader)]["restore"]
            rows[name]["restore / same layout"] = median(_ratios(figures["restore"], same))
    return rows


def _exports(run_dir: Path, folder: Path) -> dict[str, float]:
    largest = 4 * max(map(math.prod, SavedModel(run_dir).shapes.values()))
    rows: dict[str, float] = {"largest tensor, MB": largest / 1e6}
    for format in ("safetensors", "timm"):
        arguments = (ranks.measure_export, run_dir, folder / f"export-{format}", format)
        held = ranks.start(1, *arguments, True, fresh=True)["bytes"]
        seen = ranks.start(1, *arguments, False, fresh=True)
        rows |= {
            f"{format}: peak of what it holds, MB": held / 1e6,
            f"{format}: peak / largest tensor": held / largest,
            f"{format}: peak, kept by malloc included, MB": seen["bytes"] / 1e6,
            f"{format}: seconds, verification included": seen["seconds"],
        }
    return rows


def _deepspeed(config: CheckpointBench, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """The same through DeepSpeed: save, load of the same layout, and conversion and load at another world
    size. What fails is told in its row, and the rest left out.
    """
    rows: dict[str, Any] = {}
    try:
        progress("DeepSpeed's save")
        arguments = (config.model, 1, folder)
        saves = ranks.start(config.ranks, ranks.measure_deepspeed_saves, *arguments, config.rounds)
        rows["save, seconds"] = _median(saves["save"])
        rows["sync after it, seconds"] = _median(saves["sync"])
        rows["megabytes"] = saves["bytes"][0] / 1e6
        progress("DeepSpeed's load")
        load = ranks.measure_deepspeed_loads
        same = ranks.start(config.ranks, load, *arguments, "last", False, config.rounds)
        rows["load, seconds"] = _median(same["load"])
        progress("DeepSpeed's universal conversion")
        rows |= _convert(folder)
        progress("DeepSpeed's universal load")
        universal = ranks.start(config.elsewhere.world, load, *arguments, "universal", True, config.rounds)
        rows[f"universal load on {config.elsewhere}, seconds"] = _median(universal["load"])
    except (ProcessException, CheckpointError) as error:
        rows["failed"] = str(error).strip().splitlines()[-1]
    return rows


def _convert(folder: Path) -> dict[str, float]:
    """DeepSpeed's command, as it tells users to call it; the memory is that of its largest process."""
    command = [sys.executable, "-m", CONVERSION, "--input_folder", f"{folder / 'last'}"]
    command += ["--output_folder", f"{folder / 'universal'}", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", CONVERSION, "--help"], capture_output=True, check=False)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise CheckpointError(f"{CONVERSION}: {log.read().strip().splitlines()[-1]}")
    return {
        "universal conversion, seconds": time.perf_counter() - started,
        "of that, starting the command, seconds": started - began,
        "universal conversion, peak memory, MB": usage.ru_maxrss * 1024 / 1e6,
    }


def _compare(
    config: CheckpointBench, saves: Figures, loads: Mapping[str, Any], results: dict[str, Any]
) -> None:
    """From the beginning of a save to the state at another world size, both ways."""
    rows, other = results["DeepSpeed's own checkpoints"], config.elsewhere
    universal = f"universal load on {other}, seconds"
    if universal not in rows:
        return
    theirs = rows["save, seconds"] + rows["universal conversion, seconds"] + rows[universal]
    started = theirs - rows["of that, starting the command, seconds"]
    ours = _median(saves["save"]) + loads[str(other)][str(config.own)]["both, seconds"]
    results[f"save, then load on {other}"] = {
        "vitscale, durable and verified, seconds": ours,
        "DeepSpeed, seconds": theirs,
        "DeepSpeed / vitscale": theirs / ours,
        "the same, without starting the command": started / ours,
    }


def _median(figures: Sequence[float]) -> float:
    """Of the rounds that count."""
    return median(figures[1:])


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each round that counts."""
    return [one / other for one, other in zip(ours[1:], theirs[1:], strict=True)]
