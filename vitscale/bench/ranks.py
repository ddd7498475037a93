"""What the ranks of `tools/bench.py checkpoint` do, and how they are started.

All ranks of a world call the same function at once. It returns lists with one figure per round:
the slowest rank's, since a job waits for it. The first figure is round 0, which warms up caches
and allocators and does not count.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch.multiprocessing.spawn import start_processes

from vitscale import config as configs
from vitscale import distributed, rendezvous
from vitscale.checkpoint import load
from vitscale.checkpoint.manifest import TrainState
from vitscale.checkpoint.save import Saver
from vitscale.checkpoint.store import CheckpointConfig, Home, directory_of
from vitscale.engine.batches import plan_batches
from vitscale.engine.ds_config import EngineConfig
from vitscale.engine.engine import Engine
from vitscale.engine.fragments import FP32, OPTIMIZER_SLOTS, Counters, Wanted
from vitscale.errors import CheckpointError
from vitscale.models import ModelConfig, build_model
from vitscale.optim.optimizers import OptimConfig
from vitscale.system import atomic
from vitscale.weights.foreign.convert import Format, export_model
from vitscale.weights.saved import SavedModel

PRECISION = "bf16"
OPTIM = OptimConfig(weight_decay=0.1)
SLOTS = (FP32, *OPTIMIZER_SLOTS[OPTIM.name])
# What starting an engine imports, which takes each rank seconds unless done before the fork.
HEAVY = ("deepspeed", "torch._dynamo")
_M_MMAP_THRESHOLD = -3  # as in malloc.h
RAW_BLOCK = 16 << 20
# Without it DeepSpeed writes checkpoints that its own conversion refuses.
UNIVERSAL_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
T = TypeVar("T")
Figures = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the state of training is cut: over how many ranks, and at which ZeRO stage."""

    world_size: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''}, ZeRO {self.zero_stage}"


class RandomState:
    """A FragmentSource of random values, which stand for the state of a trained model."""

    def read(self, wanted: Iterable[Wanted]) -> None:
        for each in wanted:
            each.destination.normal_()


def start(world_size: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> Any:
    """Run a function of this module on every rank of a new world, and return rank 0's result.

    fresh: in processes that have done nothing before, to measure memory. If a rank fails, the
    others are ended; raises torch's ProcessException, with the traceback of that rank.
    """
    method = "forkserver"
    if fresh or torch.cuda.is_available():  # CUDA does not survive a fork
        method = "spawn"
    else:  # ranks are forked from a process that has imported everything, so they start at once
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        multiprocessing.set_forkserver_preload([*HEAVY, __name__])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        start_processes(
            _rank,
            (function, world_size, rendezvous.free_port(), arguments, result),
            nprocs=world_size,
            start_method=method,
        )
        return json.loads(result.read_text())


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    arguments: tuple[Any, ...],
    result: Path,
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed prints; errors travel as exceptions
    os.dup2(1, 2)
    gc.freeze()  # DeepSpeed collects garbage six times at start: do not look at the imports each time
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.initialize()
    figures = function(*arguments)
    if distributed.is_main():
        result.write_text(json.dumps(figures))
    distributed.shutdown()


def measure_saves(model: ModelConfig, stage: int, folder: Path, rounds: int) -> Figures:
    """Raw writes and saves of the same bytes, in turns.

    A round is a raw write, a save in the background, a raw write, a save in the foreground, and
    a checksum alone. A save always follows a raw write, and a raw write never does: a machine
    is faster at what it has just done. `folder` is emptied between the turns.
    """
    engine = make_engine(model, stage)
    random = torch.randint(256, (_num_bytes(engine),), dtype=torch.uint8)
    share = memoryview(random.numpy())  # pyright: ignore[reportArgumentType] (ndarray is a buffer)
    background, foreground = _saver(folder, background=True), _saver(folder, background=False)
    ways: list[Callable[[int], dict[str, float]]] = [
        lambda _: _write_raw(share, folder),
        lambda round_index: _save(background, engine, model, round_index),
        lambda _: {"raw_again": _write_raw(share, folder)["raw"]},
        lambda round_index: {"foreground": _save(foreground, engine, model, round_index)["save"]},
        lambda _: {"checksum": timed(lambda: xxhash.xxh3_128(share).digest())[1]},
    ]
    figures: Figures = {"bytes": distributed.all_reduce_sum([float(len(share))])}
    for round_index in range(rounds + 1):
        for way in ways:
            _settle(folder)
            for name, seconds in way(round_index).items():
                figures.setdefault(name, []).append(seconds)
    return figures


def measure_gather(num_rows: int, num_files: int) -> dict[str, float]:
    """What rank 0 gets from all for a manifest, if each rank has so many pieces and files."""
    rows = torch.zeros(num_rows, 3, dtype=torch.int64)
    file = ["rank-00000.safetensors", {"num_bytes": 1 << 20, "checksum": "0" * 32}]

    def gather() -> None:
        distributed.gather_rows_to_main(rows)
        distributed.gather_json_to_main([file] * num_files)

    return {"seconds": min(timed(gather)[1] for _ in range(3))}


def write_checkpoint(model: ModelConfig, stage: int, run_dir: Path) -> None:
    """Save one checkpoint with this world size and stage in `run_dir`."""
    engine = make_engine(model, stage)
    _save(_saver(run_dir, background=False), engine, model, 1)


def measure_loads(
    model: ModelConfig, stage: int, runs: Mapping[str, Path], rounds: int
) -> dict[str, Figures]:
    """Verify each run's checkpoint (every byte is hashed) and restore it, the runs in turns."""
    engine = make_engine(model, stage)
    figures: dict[str, Figures] = {name: {"verify": [], "restore": []} for name in runs}
    names = list(runs)
    for round_index in range(rounds + 1):
        first = round_index % len(names)  # each round begins with another run
        for name in names[first:] + names[:first]:
            engine._ds.basic_optimizer.state.clear()  # as in a new engine
            home = Home(directory_of(runs[name]))
            checkpoint, verify = timed(functools.partial(load.find, home))
            if not checkpoint:
                raise CheckpointError(f"{home.directory} holds no checkpoint")
            _, restore = timed(functools.partial(load.resume, engine, checkpoint))
            figures[name]["verify"].append(verify)
            figures[name]["restore"].append(restore)
    return figures


def measure_export(run_dir: Path, out: Path, format: Format, returning: bool) -> dict[str, float]:
    """How much the resident memory of a fresh process grows at its peak during an export.

    returning: malloc returns freed memory at once, and a first export has allocated what a
        process allocates once, so that the growth is what the export holds. Otherwise, the
        growth is what one sees from outside.

    Linux and glibc only.
    """
    SavedModel(run_dir)  # imports, buffers and a first verification do not count
    if returning:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        export_model(run_dir, out / "before", format=format)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = _memory("VmRSS"), time.perf_counter()
    export_model(run_dir, out / "measured", format=format)
    seconds = time.perf_counter() - began
    return {"bytes": _memory("VmHWM") - before, "seconds": seconds}


def _memory(field: str) -> float:
    """A field of /proc/self/status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def measure_deepspeed_saves(model: ModelConfig, stage: int, folder: Path, rounds: int) -> Figures:
    """DeepSpeed's own save, and the sync that makes it durable, which it does not do itself.

    The last one remains, under the tag "last".
    """
    engine = make_engine(model, stage)
    save = functools.partial(engine._ds.save_checkpoint, str(folder), "last", UNIVERSAL_STATE)
    figures: Figures = {"save": [], "sync": []}
    for _ in range(rounds + 1):
        _settle(folder)
        figures["save"].append(timed(save)[1])
        figures["sync"].append(timed(lambda: os.sync() if distributed.is_main() else None)[1])
    figures["bytes"] = [float(sum(file.stat().st_size for file in (folder / "last").iterdir()))]
    return figures


def measure_deepspeed_loads(
    model: ModelConfig, stage: int, folder: Path, tag: str, universal: bool, rounds: int
) -> Figures:
    """DeepSpeed's own load: of the same sharding or, if `universal`, of what was converted."""
    engine = make_engine(model, stage, {"checkpoint": {"load_universal": True}} if universal else {})
    loads = []
    for _ in range(rounds + 1):
        engine._ds.basic_optimizer.state.clear()
        (path, _), seconds = timed(functools.partial(engine._ds.load_checkpoint, str(folder), tag))
        loads.append(seconds)
        if path is None:
            raise CheckpointError(f"DeepSpeed loaded nothing from {folder}/{tag}")
    return {"load": loads}


def make_engine(model: ModelConfig, stage: int, deepspeed_extra: Mapping[str, Any] | None = None) -> Engine:
    """An engine as in the middle of training: all its slots exist, with random values."""
    options = EngineConfig(zero_stage=stage, deepspeed_extra=dict(deepspeed_extra or {}))
    plan = plan_batches(distributed.world_size(), 0, distributed.world_size())
    engine = Engine(build_model(model, seed=0), OPTIM, options, plan, PRECISION)
    engine.restore(RandomState(), SLOTS, Counters(global_steps=1))
    return engine


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """An action's result, and the seconds of the slowest rank; all ranks start together."""
    distributed.barrier()
    began = time.perf_counter()
    result = action()
    return result, distributed.all_reduce_max([time.perf_counter() - began])[0]


def _num_bytes(engine: Engine) -> int:
    """The size of this rank's share of a checkpoint."""
    slots = engine.owned().values()
    return sum(tensor.numel() * tensor.element_size() for slot in slots for tensor in slot.values())


def _write_raw(share: memoryview, folder: Path) -> dict[str, float]:
    """Large blocks and an fsync, to one file per rank, as fast as the file system can."""

    def write() -> float:
        began = time.perf_counter()
        with open(folder / f"raw-{distributed.rank()}", "wb", buffering=0) as file:
            for at in range(0, len(share), RAW_BLOCK):
                file.write(share[at : at + RAW_BLOCK])
            written = time.perf_counter() - began
            os.fsync(file.fileno())
        return written

    written, whole = timed(write)
    return {"raw": whole, "raw_write": distributed.all_reduce_max([written])[0]}


def _saver(run_dir: Path, background: bool) -> Saver:
    # Keeps all, so that no deletion of old checkpoints is timed.
    config = CheckpointConfig(keep_last=10**6, background=background)
    return Saver(Home(directory_of(run_dir)), config)


def _save(saver: Saver, engine: Engine, model: ModelConfig, step: int) -> dict[str, float]:
    """Seconds of one save until its commit: in all, blocking training, and writing alone."""

    def save() -> None:
        saver.save(engine, train_state(model, step))
        saver.wait()

    _, whole = timed(save)
    ((_, cost),) = saver.finished()
    blocked, writing = cost["checkpoint/blocked_seconds"], cost["checkpoint/seconds"]
    blocked, writing = distributed.all_reduce_max([blocked, writing])
    return {"save": whole, "blocked": blocked, "writing": writing}


def _settle(folder: Path) -> None:
    """Empty the folder and flush dirty pages, which is not timed; every rank calls it."""
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        atomic.sync_folder(folder)
        os.sync()
    distributed.barrier()


def train_state(model: ModelConfig, step: int) -> TrainState:
    """The trainer's part of a manifest, as far as a measurement needs it."""
    return TrainState(
        step=step,
        data_step=step,
        samples_seen=step,
        bad_samples=0,
        steps_per_epoch=0,
        data_fingerprint="",
        decoder="",
        precision=PRECISION,
        config={"model": configs.to_dict(model)},
        versions={},
    )
