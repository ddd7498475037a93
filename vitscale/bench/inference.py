"""`tools/bench.py inference`: images per second of a forward pass, and the largest batch.

The paper's Figure 12 (appendix D.5). Each model is measured at each image size, in batches of
powers of two, on pixels that are on the device already. It runs as evaluations in training do:
eagerly, without gradients, with weights of the run's precision and logits in fp32.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vitscale import distributed
from vitscale.bench import device
from vitscale.bench.suite import SAME, machine, read
from vitscale.config import positive, to_dict
from vitscale.engine.ds_config import Precision
from vitscale.engine.engine import DTYPES
from vitscale.image_size import pixels, sides, whole_patches
from vitscale.models import HybridConfig, ModelConfig, ResNetConfig, build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.system import hardware

# A round has several short passes, which a GPU computes without waiting for the next.
ROUND_SECONDS = 0.2
SETTINGS = (*SAME, "precision", "rounds", "timed up to a batch of")  # for all rows of a file
Pass = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceBench:
    """What is measured.

    models: by the name that their rows have.
    sizes: sides of square images in pixels; at_size says what a model makes of one.
    precision: of weights and activations.
    max_batch: no larger batch is timed.
    rounds: each figure is the median over them.
    """

    models: Mapping[str, ModelConfig]
    sizes: Sequence[int]
    precision: Precision
    max_batch: int
    rounds: int

    def __post_init__(self) -> None:
        positive("", **{"--rounds": self.rounds, "--max-batch": self.max_batch, "--sizes": min(self.sizes)})


def model_of(name: str) -> ModelConfig:
    """The model of a variant of any kind, which may have the paper's ViT- before its letter.

    Axial- before a variant makes it the ViT with axial attention. Raises ConfigError for a name
    that no kind has.
    """
    variant = name.replace("ViT-", "")
    if variant.startswith("Axial-"):
        return ViTConfig(variant=variant.removeprefix("Axial-"), attention="axial", pool="mean")
    if "+" in variant:
        return HybridConfig(variant=variant)
    return ResNetConfig(variant=variant) if re.match(r"R\d+x", variant) else ViTConfig(variant=variant)


def at_size(model: ModelConfig, size: int) -> ModelConfig:
    """The model for square images, rounded down to whole patches as in a fine-tuning.

    Raises ConfigError for images that are smaller than a patch.
    """
    patch = model.resolved_patch_size if isinstance(model, ViTConfig) else 1
    return dataclasses.replace(model, image_size=whole_patches(size, patch))


def run(
    bench: InferenceBench,
    path: Path | None,
    save: Callable[[dict[str, Any]], None],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure what the file at `path` lacks, and return all of it.

    save: writes the results so far to that file, after each row. Raises ConfigError for sizes
    that a model cannot have, and for a file of other settings, or of something else.
    """
    pieces = [(name, at_size(model, size)) for name, model in bench.models.items() for size in bench.sizes]
    distributed.initialize()
    hardware.allow_tf32(False)
    settings = {"precision": bench.precision, "rounds": bench.rounds}
    here: dict[str, Any] = machine() | settings | {"timed up to a batch of": bench.max_batch}
    done = read("--json", path, here, SETTINGS, "inference") if path and path.exists() else here
    for name, model in pieces:
        title, config = f"{name} at {pixels(model.image_size)}", to_dict(model)
        if done.get(title, {}).get("config") != config:
            found = measure(bench, model, lambda stage, title=title: progress(f"{title}: {stage}"))
            done[title] = {"model": name, "config": config, **found}
            save(done)
    return done


def measure(bench: InferenceBench, model: ModelConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """The row of one model at its image size. On a CPU it has no largest batch."""
    dtype, where = DTYPES[bench.precision], distributed.device()
    module = build_model(model, seed=0).to(dtype).eval()

    def prepare(batch: int) -> Pass:
        module.to(where)  # in here, so that a GPU too small for the weights alone ends the row
        images = torch.empty(batch, 3, *sides(model.image_size), dtype=dtype, device=where).uniform_(-1, 1)
        return lambda: module(images)

    with torch.inference_mode():
        return sweep(prepare, bench, progress, to_the_end=torch.cuda.is_available())


def sweep(
    prepare: Callable[[int], Pass],
    bench: InferenceBench,
    progress: Callable[[str], None],
    *,
    to_the_end: bool,
) -> dict[str, Any]:
    """Double the batch: time passes until the peak is past, then try a pass of each.

    prepare: makes images of a batch, and returns a forward pass on them.
    to_the_end: whether batches that are not timed are tried, until one fails.
    """
    speeds: dict[str, float] = {}
    batch, ended_by = 1, ""
    while not ended_by:
        timed = batch <= bench.max_batch and not past_peak(list(speeds.values()))
        if not timed and not to_the_end:
            break
        progress(f"batch of {batch:,}")
        device.free()
        try:
            if timed:
                speeds[str(batch)] = batch / seconds_of_pass(prepare(batch), bench.rounds)
            else:
                _seconds(prepare(batch), 1)
            batch *= 2
        except RuntimeError as error:
            # Of tiny images, a batch may be too large for a kernel before it is for the memory.
            if not to_the_end or (batch == 1 and not hardware.lacks_memory(error)):
                raise
            ended_by = "out of memory" if hardware.lacks_memory(error) else str(error).partition("\n")[0]
    if not speeds:
        return {"failed": ended_by}
    peak = max(speeds, key=lambda batch: speeds[batch])
    row = {"images/s at a batch of": speeds, "peak, images/s": speeds[peak], "peak at a batch of": int(peak)}
    return row | ({"largest batch": batch // 2, "a larger one ended by": ended_by} if ended_by else {})


def past_peak(speeds: Sequence[float]) -> bool:
    """Whether two doublings of the batch have not made it 1% faster."""
    return len(speeds) > 2 and max(speeds[-2:]) < 1.01 * max(speeds[:-2])


def seconds_of_pass(forward: Pass, rounds: int) -> float:
    """The median of the rounds, each of as many passes as take about ROUND_SECONDS."""
    forward()  # allocates, and chooses kernels
    passes = max(1, round(ROUND_SECONDS / _seconds(forward, 1)))
    return median(_seconds(forward, passes) for _ in range(rounds))


def _seconds(forward: Pass, passes: int) -> float:
    """Of one pass, the mean of several."""
    device.wait()
    began = time.perf_counter()
    for _ in range(passes):
        forward()
    device.wait()
    return (time.perf_counter() - began) / passes
