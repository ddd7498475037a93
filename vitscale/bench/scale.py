"""`tools/bench.py scale`: what checkpoints cost on thousands of ranks, without starting them.

Which rank has which part of every tensor follows from ZeRO's arithmetic. From there on the real
code works: the manifest of all ranks is built, written, read and checked, and the reads of a
resume are planned. Only the gathering is done by a few processes, which stand for all.
"""

import dataclasses
import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64

from vitscale.bench import ranks
from vitscale.bench.ranks import SLOTS, Sharding
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import MANIFEST, Manifest, TensorInfo, numbered, read_text
from vitscale.checkpoint.reshard import piece
from vitscale.checkpoint.safetensors import RANGE_BYTES, Part, together
from vitscale.checkpoint.snapshot import Snapshot, assemble
from vitscale.checkpoint.verify import check_manifest
from vitscale.engine.fragments import Counters, Wanted
from vitscale.engine.setup import RANK_MULTIPLE
from vitscale.errors import ConfigError
from vitscale.memory import state_bytes
from vitscale.models import ModelConfig, empty_model
from vitscale.models.vit_config import ViTConfig
from vitscale.optim.optimizers import kernels
from vitscale.system import open_files

GATHERING = 4  # processes
SAMPLED = 8  # ranks, whose reads are planned
VALUE_BYTES = 4
# A file is opened by three requests: the length of its header, its size, the header.
OPENING = 3
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleBench:
    """ranks, zero: numbers of ranks and ZeRO stages, all pairs of them; variant: of the ViT."""

    ranks: tuple[int, ...] = (1024, 4096)
    zero: tuple[int, ...] = (1, 3)
    variant: str = "H/14"

    def __post_init__(self) -> None:
        if min(self.ranks) < GATHERING:
            raise ConfigError(f"--ranks {min(self.ranks)} must be {GATHERING} or more")
        if not set(self.zero) <= {1, 2, 3}:
            raise ConfigError(f"--zero {', '.join(map(str, self.zero))} must be of 1, 2 and 3")

    @property
    def model(self) -> ViTConfig:
        return ViTConfig(variant=self.variant)


def run(config: ScaleBench, progress: Callable[[str], None]) -> dict[str, Any]:
    parts = Parts.of(config.model)
    results: dict[str, Any] = {"model": config.variant, "parameters": sum(parts.sizes)}
    for world_size in config.ranks:
        for stage in config.zero:
            layout = Sharding(world_size, stage)
            progress(str(layout))
            others = [Sharding(world_size // 2, stage)]
            others += [Sharding(world_size, other) for other in config.zero if other != stage]
            results[f"{world_size:,} ranks, ZeRO {stage}"] = _figures(config, parts, layout, others)
    return results


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parameters of a model, and the groups of its optimizer, as numbers of parameters."""

    shapes: dict[str, tuple[int, ...]]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: ModelConfig) -> "Parts":
        model = empty_model(config)
        decayed = kernels(model)
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        groups = [[i for i, name in enumerate(shapes) if (name in decayed) == kind] for kind in (True, False)]
        return cls(shapes, tuple(map(tuple, groups)))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    def cut(self, layout: Sharding) -> list[np.ndarray]:
        """The pieces of each rank, [n, 3], as in snapshot.assemble."""
        cut = self._cut_each if layout.zero_stage == 3 else self._cut_flat
        rows = cut(layout.world_size)  # [n, 4]
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        ends = np.searchsorted(rows[:, 0], np.arange(layout.world_size), side="right")
        return [part[:, 1:] for part in np.split(rows, ends)[: layout.world_size]]

    def _cut_each(self, world_size: int) -> Int64[np.ndarray, "n 4"]:
        """ZeRO 3 cuts each parameter by itself, into equal pieces; the last may be smaller."""
        rows = []
        for number, size in enumerate(self.sizes):
            each = piece(size, 0, world_size)[1]
            starts = np.arange(0, size, each)
            numbers = np.full_like(starts, number)
            counts = np.minimum(each, size - starts)
            rows.append(np.stack([starts // each, numbers, starts, counts], axis=1))
        return np.concatenate(rows)

    def _cut_flat(self, world_size: int) -> Int64[np.ndarray, "n 4"]:
        """ZeRO 1 and 2 cut each group as one buffer, padded so that ranks get equally many."""
        rows = []
        for group in self.groups:
            ends = np.cumsum([self.sizes[number] for number in group])
            share = RANK_MULTIPLE * -(-int(ends[-1]) // (RANK_MULTIPLE * world_size))
            cuts = np.unique(np.concatenate([[0], ends, np.arange(0, ends[-1], share)]))
            at, counts = cuts[:-1], np.diff(cuts)
            places = np.searchsorted(ends, at, side="right")
            begins = np.concatenate([[0], ends])[places]
            rows.append(np.stack([at // share, np.array(group)[places], at - begins, counts], axis=1))
        return np.concatenate(rows)


def _figures(config: ScaleBench, parts: Parts, layout: Sharding, others: list[Sharding]) -> dict[str, Any]:
    world_size, pieces = layout.world_size, parts.cut(layout)
    share = len(SLOTS) * VALUE_BYTES * max(int(part[:, 2].sum()) for part in pieces)
    files = [
        [f"rank-{rank:05d}.safetensors", {"num_bytes": share, "checksum": f"{rank:032x}"}]
        for rank in range(world_size)
    ]
    rows = [torch.from_numpy(part) for part in pieces]
    snapshot = _snapshot(config, parts, layout)
    gathered = ranks.start(
        GATHERING, ranks.measure_gather, sum(map(len, rows)) // GATHERING, world_size // GATHERING
    )
    manifest, figures = _measure_manifest(lambda: assemble(snapshot, files, rows))
    state = state_bytes(sum(parts.sizes), layout.zero_stage, world_size, ranks.PRECISION)
    return {
        "gathered to rank 0, MB": sum(part.nbytes for part in pieces) / 1e6,
        f"gathered from {GATHERING} processes, seconds": gathered["seconds"],
        **figures,
        "files per save": world_size + 2,
        "share of a rank in a checkpoint, MB": share / 1e6,
        "state of a rank on its device, MB": state / 1e6,
        "sockets of a rank": open_files.sockets(world_size, rank=1),
        "sockets of rank 0": open_files.sockets(world_size, rank=0),
        "open files that a rank needs": open_files.needed(world_size),
        **{f"resume on {other}": _resume(parts, pieces, manifest, other) for other in (layout, *others)},
    }


def _snapshot(config: ScaleBench, parts: Parts, layout: Sharding) -> Snapshot:
    manifest = Manifest(
        train=ranks.train_state(config.model, 1),
        optimizer=ranks.OPTIM.name,
        slots=SLOTS,
        counters=Counters(global_steps=1),
        loss_scaler={},
        world_size=layout.world_size,
        zero_stage=layout.zero_stage,
        created="",
        tensors={name: TensorInfo(shape=shape, fragments=()) for name, shape in parts.shapes.items()},
        files={},
    )
    return Snapshot(manifest=manifest, pieces=[], tensors={})


def _measure_manifest(build: Callable[[], Manifest]) -> tuple[Manifest, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        manifest, building = _timed(build)
        _, writing = _timed(lambda: manifest.save(path))
        text, reading = _timed(lambda: read_text(folder))
        _, parsing = _timed(lambda: Manifest.parse(text, folder))
        problem, checking = _timed(lambda: check_manifest(folder, manifest))
        assert not problem, problem
        return manifest, {
            "manifest, MB": path.stat().st_size / 1e6,
            "built by rank 0, seconds": building,
            "written by rank 0, seconds": writing,
            "read by rank 0, seconds": reading,
            "parsed by each rank, seconds": parsing,
            "checked by each rank, seconds": checking,
            "memory of rank 0 to build and write, MB": _peak(lambda: build().save(path)),
            "memory of each rank to read, MB": _peak(lambda: Manifest.parse(text, folder)),
        }


def _resume(parts: Parts, pieces: list[np.ndarray], manifest: Manifest, reader: Sharding) -> dict[str, Any]:
    """What a rank reads to resume as `reader`: the most that any of the sampled ranks does.

    pieces: of the ranks that wrote the checkpoint.
    """
    owned = parts.cut(reader)
    sampled = np.unique(np.linspace(0, reader.world_size - 1, SAMPLED).astype(int))
    figures = [_reads(parts, pieces, manifest, owned[rank]) for rank in sampled]
    files = -(-len(manifest.files) // reader.world_size)
    return {
        "files opened": max(files for files, _, _ in figures),
        "requests": max(requests for _, requests, _ in figures),
        "MB read": max(num_bytes for _, _, num_bytes in figures) / 1e6,
        "read / owned": max(
            num_bytes / (len(SLOTS) * VALUE_BYTES * owned[rank][:, 2].sum())
            for rank, (_, _, num_bytes) in zip(sampled, figures, strict=True)
        ),
        "files hashed before": files,
    }


def _reads(
    parts: Parts, pieces: list[np.ndarray], manifest: Manifest, owned: Int64[np.ndarray, "n 3"]
) -> tuple[int, int, int]:
    """Files, requests and bytes of the values that a rank reads which owns these pieces."""
    names, numbers = list(parts.shapes), numbered(manifest.files)
    reader = FragmentReader("", manifest)
    parts_of: dict[str, list[Part]] = {}
    for number, start, count in owned.tolist():
        wanted = Wanted(torch.empty(count, device="meta"), SLOTS[0], names[number], start)
        for file, values, _, first in reader.ranges(wanted):
            written = pieces[numbers[file]]
            before = int(written[written[:, 0] < number, 2].sum()) + first
            share = int(written[:, 2].sum())
            for slot in range(len(SLOTS)):
                begin = VALUE_BYTES * (slot * share + before)
                end = begin + VALUE_BYTES * len(values)
                parts_of.setdefault(file, []).append(Part(begin, end, "", torch.float32, values))
    groups = [group for each in parts_of.values() for group in together(each)]
    lengths = [group[-1].end - group[0].position for group in groups]
    requests = OPENING * len(parts_of) + sum(-(-length // RANGE_BYTES) for length in lengths)
    return len(parts_of), requests, sum(lengths)


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return action(), time.perf_counter() - began


def _peak(action: Callable[[], object]) -> float:
    """The most memory that an action's Python objects and arrays took at a time, in MB."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
