"""`tools/bench.py step --suite`: the paper's models on one GPU, piece by piece into one file.

The file is written after each piece, and a piece that it holds is not measured again, so that
the suite can be stopped anywhere and continued on the same machine with the same software.
"""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale.bench import device, step
from vitscale.bench.step import Case, StepBench, every_case
from vitscale.errors import ConfigError, DataError
from vitscale.metrics.rows import read_metrics
from vitscale.metrics.writer import FILE_NAME
from vitscale.models.vit_config import ViTConfig
from vitscale.system import atomic
from vitscale.system.cores import num_cores

# Images of a step, which fit into 80 GB without recomputation.
BATCHES = {"S/16": 1024, "B/16": 512, "L/16": 256, "H/14": 128}
DEFAULT_BATCH = 64
SAME = ("device", "torch", "deepspeed")  # for all pieces of a file
PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "train.py"
END_TO_END_STEPS = 120

# What is missing here are the defaults of TrainConfig.
END_TO_END = """
run_dir = "{folder}/run"
global_batch = 512
total_steps = {steps}
precision = "bf16"

[model]
variant = "{variant}"

[data]
index = "{index}"
lanes = {workers}

[schedule]
warmup_steps = 10

[engine]
compile = true
num_workers = {workers}

[checkpoint]
every_steps = 0

[log]
every_steps = 20
tensorboard = false
"""


def pieces(variants: Sequence[str], batch: int, wanted: Callable[[Case], bool]) -> dict[str, StepBench]:
    """What is measured for each variant: the cases that are wanted. batch: 0 = BATCHES."""
    measured = {}
    for variant in variants:
        model = ViTConfig(variant=variant)
        cases = tuple(filter(wanted, every_case(model)))
        images = batch or BATCHES.get(variant, DEFAULT_BATCH)
        measured[variant] = StepBench(model=model, batch=images, cases=cases)
    return measured


def run(
    path: Path,
    index: str,
    variants: Sequence[str],
    batch: int,
    wanted: Callable[[Case], bool],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure what the file at `path` lacks, and return all of it.

    index: of photographs, for the end-to-end piece; "" leaves it out.

    Raises ConfigError for a file of another device or other versions, or of something else.
    """
    here = machine()
    done = read("--suite", path, here, SAME) if path.exists() else here
    for name, bench in pieces(variants, batch, wanted).items():
        piece = done.get(name, {})
        if not _holds(piece, bench):
            # Rows are compared within one process: those that the piece has are measured again.
            kept = [case for case in every_case(bench.model) if str(case) in piece]
            cases = tuple(dict.fromkeys([*bench.cases, *kept]))
            done[name] = step.run(dataclasses.replace(bench, cases=cases), progress)
            _write(path, done)
    if index and "end to end" not in done:
        progress("end to end")
        done["end to end"] = end_to_end(index, "S/16")
        _write(path, done)
    return done


def end_to_end(index: str, variant: str) -> dict[str, Any]:
    """Training from JPEG shards by the real program, with about a data worker per core."""
    workers = num_workers(num_cores())
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        path = Path(folder) / "config.toml"
        path.write_text(end_to_end_config(folder, index, variant, workers))
        done = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"{PROGRAM.name} ended with status {done.returncode}"]
            raise DataError(f"end to end: {said[-1]}")
        metrics = read_metrics(Path(folder) / "run" / FILE_NAME)
        rows = [row for row in metrics if "perf/images_per_second" in row]
    last = rows[-1]
    return {
        "model": variant,
        "data workers": workers,
        "images/s": last["perf/images_per_second"],
        "images/s per data worker": last["perf/images_per_second"] / workers,
        "waiting for data, share": last["time/data_wait_fraction"],
    }


def num_workers(cores: int) -> int:
    """The largest power of two up to `cores`: lanes, one each, divide the batch."""
    return 1 << (cores.bit_length() - 1)


def end_to_end_config(folder: str, index: str, variant: str, workers: int) -> str:
    """The config of the end-to-end run, as TOML."""
    return END_TO_END.format(
        folder=folder, steps=END_TO_END_STEPS, variant=variant, index=index, workers=workers
    )


def machine() -> dict[str, Any]:
    """What a file says of where it was measured: the device, the software, and how."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": device.name(),
        "cores": num_cores(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
    }


def read(
    option: str, path: Path, here: Mapping[str, Any], same: Sequence[str], bench: str = ""
) -> dict[str, Any]:
    """What a file of results holds, if it continues here.

    option: names the file in errors. here: what is measured now, which `same` says must equal
    what the file has. bench: whose results --json wrote; "" = a file of a suite. Raises
    ConfigError for any other file.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"{option} {path} cannot be read: {reason}; name a new file") from None
    done = file if isinstance(file, dict) else {}
    if bench:
        results = done.get("results") if done.get("bench") == bench else {}
        done = results if isinstance(results, dict) else {}
    rows = [value for name, value in done.items() if name not in here]
    if not done.keys() >= set(same) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{option} {path} has no results that can be continued; name a new file")
    for name in same:
        if done[name] != here[name]:
            raise ConfigError(
                f"{option} {path} was measured with {name} {done[name]}, and here it is {here[name]}: name a "
                "new file, into which all is measured again"
            )
    return done


def _holds(piece: dict[str, Any], bench: StepBench) -> bool:
    """Whether a piece has all that is wanted of it, for the same batch."""
    return piece.get("images of a step") == bench.batch and all(str(case) in piece for case in bench.cases)


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, (json.dumps(results, indent=1) + "\n").encode())
