"""`tools/bench.py checkpoint`: what saving, loading and exporting cost.

The baselines are a raw write of the same bytes, and DeepSpeed's own checkpoints. Real ranks
write and read a state of real size with random values. A disk's speed changes from minute to
minute: so what is compared is measured in turns, in the same processes and rounds, and each
ratio is the median of the rounds' ratios. The page cache is warm in every load. How much a save
in the background slows down training is not measured.
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
from vitscale.bench.ranks import Figures, Sharding
from vitscale.config import positive
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.saved import SavedModel

CONVERSION = "deepspeed.checkpoint.ds_to_universal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointBench:
    """What is measured.

    variant: of the ViT that is saved.
    ranks: how many processes save it, at ZeRO 1.
    rounds: each figure is a median over them.
    folder: on the disk to measure; "" = a temporary one.
    deepspeed: measure DeepSpeed's own checkpoints, too.
    """

    variant: str = "B/16"
    ranks: int = 2
    rounds: int = 5
    folder: str = ""
    deepspeed: bool = True

    def __post_init__(self) -> None:
        positive("", **{"--ranks": self.ranks, "--rounds": self.rounds})
        if not _fits(self.ranks):
            raise ConfigError(
                f"--ranks {self.ranks} needs as many GPUs, and there are {torch.cuda.device_count()}; lower "
                'it, or set CUDA_VISIBLE_DEVICES="" to measure on the CPU'
            )

    @property
    def model(self) -> ViTConfig:
        return ViTConfig(variant=self.variant)

    @property
    def own(self) -> Sharding:
        """The sharding that saves; the loads of the others are compared to its load."""
        return Sharding(self.ranks, 1)

    @property
    def others(self) -> list[Sharding]:
        """Other numbers of ranks, if there are enough devices, and another ZeRO stage."""
        sizes = sorted({size for size in (1, 2, 2 * self.ranks) if size != self.ranks and _fits(size)})
        return [*(Sharding(size, 1) for size in sizes), Sharding(self.ranks, 3)]

    @property
    def elsewhere(self) -> Sharding:
        """The sharding that a checkpoint is moved to; its own, on a machine with one GPU."""
        return self.others[0] if len(self.others) > 1 else self.own


def _fits(world_size: int) -> bool:
    """Whether each rank gets a device of its own; on the CPU, always."""
    return not torch.cuda.is_available() or world_size <= torch.cuda.device_count()


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
        for writer in (config.own, *config.others):
            progress(f"a checkpoint of {writer}")
            runs[str(writer)] = run_dir = folder / str(writer)
            ranks.start(writer.world_size, ranks.write_checkpoint, config.model, writer.zero_stage, run_dir)
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
    """The rows about saving. A raw write ends with its fsync, a save with its commit."""
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
    config: CheckpointBench, reader: Sharding, runs: Mapping[str, Path], progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """One reader's loads of every run's checkpoint; ratios are to that of its own sharding."""
    progress(f"loading on {reader}")
    arguments = (config.model, reader.zero_stage, runs, config.rounds)
    measured = ranks.start(reader.world_size, ranks.measure_loads, *arguments)
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
    """Memory and time of each export format. It must hold at least the largest tensor."""
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
    """The same with DeepSpeed: save, load in the same sharding, convert, and load in another.

    If one of them fails, a row says so, and the rest is left out.
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
        universal = ranks.start(
            config.elsewhere.world_size, load, *arguments, "universal", True, config.rounds
        )
        rows[f"universal load on {config.elsewhere}, seconds"] = _median(universal["load"])
    except (ProcessException, CheckpointError) as error:
        rows["failed"] = str(error).strip().splitlines()[-1]
    return rows


def _convert(folder: Path) -> dict[str, float]:
    """DeepSpeed's command, as its documentation has it; the memory is its largest process's."""
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
    """From the start of a save to the state at another world size, in both ways."""
    rows, target = results["DeepSpeed's own checkpoints"], config.elsewhere
    universal = f"universal load on {target}, seconds"
    if universal not in rows:
        return
    theirs = rows["save, seconds"] + rows["universal conversion, seconds"] + rows[universal]
    started = theirs - rows["of that, starting the command, seconds"]
    ours = _median(saves["save"]) + loads[str(target)][str(config.own)]["both, seconds"]
    results[f"save, then load on {target}"] = {
        "vitscale, durable and verified, seconds": ours,
        "DeepSpeed, seconds": theirs,
        "DeepSpeed / vitscale": theirs / ours,
        "the same, without starting the command": started / ours,
    }


def _median(figures: Sequence[float]) -> float:
    """The median of the rounds that count: all except round 0."""
    return median(figures[1:])


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each round that counts."""
    pairs = zip(numerators[1:], denominators[1:], strict=True)
    return [numerator / denominator for numerator, denominator in pairs]
