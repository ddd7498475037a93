"""What the ranks of `tools/bench.py checkpoint` do, each in a process of its own, and how they are started.

Every function here is called by all ranks of a world at once and returns lists of one figure a round: the
slowest rank's, since a job waits for it. Round 0 warms up caches and allocators; it stands first in the list.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from vitscale import config as configs
from vitscale import distributed, storage
from vitscale import engine as engines
from vitscale.checkpoint import load, state
from vitscale.checkpoint.export import SavedModel
from vitscale.checkpoint.foreign.convert import Format, export_model
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.saver import Saver
from vitscale.checkpoint.store import CheckpointConfig, Home, directory_of
from vitscale.engine import EngineConfig, deepspeed_config, plan_batches
from vitscale.models import build_model
from vitscale.models.vit import ModelConfig
from vitscale.optim import OptimConfig, build_optimizer

PRECISION = "bf16"
OPTIM = OptimConfig(weight_decay=0.1)
STATES = state.OPTIMIZER_STATES[OPTIM.name]
# What starting an engine imports: seconds for each rank, unless it was imported before the fork.
HEAVY = ("deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
_M_MMAP_THRESHOLD = -3  # of malloc.h
RAW_BLOCK = 16 << 20
# Without it DeepSpeed writes checkpoints that its own conversion refuses.
UNIVERSAL_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
T = TypeVar("T")
Figures = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the state of training is cut: over how many ranks, and by which ZeRO stage."""

    world: int
    stage: int

    def __str__(self) -> str:
        return f"{self.world} rank{'s' if self.world > 1 else ''}, ZeRO {self.stage}"


class RandomState:
    """Random values for every range that is asked for (state.FragmentSource): the state of a trained model,
    without the training.
    """

    def read_into(self, destination: Tensor, state: str, name: str, start: int) -> None:
        destination.normal_()


def start(world: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> Any:
    """Run a function of this module on every rank of a new world; returns what rank 0 returns.

    fresh: in a process that has done nothing before, for figures of memory. Raises torch's ProcessException,
    with the traceback of the rank that failed, after ending the others.
    """
    method = "forkserver"
    if fresh or torch.cuda.is_available():  # CUDA does not outlive a fork
        method = "spawn"
    else:  # ranks are forked from a process that has imported everything, and start at once
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        multiprocessing.set_forkserver_preload([*HEAVY, __name__])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        start_processes(
            _rank, (function, world, _free_port(), arguments, result), nprocs=world, start_method=method
        )
        return json.loads(result.read_text())


def _rank(
    rank: int, function: Callable[..., Any], world: int, port: int, arguments: tuple[Any, ...], result: Path
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed talks; an error travels as an exception
    os.dup2(1, 2)
    gc.freeze()  # DeepSpeed collects garbage six times as an engine starts; what is imported is none
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.initialize()
    figures = function(*arguments)
    if distributed.is_main():
        result.write_text(json.dumps(figures))
    distributed.shutdown()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure_saves(model: ModelConfig, stage: int, folder: Path, rounds: int) -> Figures:
    """Raw writes and saves of the same bytes in turns: raw, in the background, raw again, in the foreground.

    A save always comes after a raw write, and a raw write after a save: machines are faster at what they
    have just done. Whatever `folder` holds is deleted between the turns.
    """
    engine = make_engine(model, stage)
    random = torch.randint(256, (_num_bytes(engine),), dtype=torch.uint8)
    share = memoryview(random.numpy())  # pyright: ignore[reportArgumentType] (ndarray is a buffer)
    background, foreground = _saver(folder, background=True), _saver(folder, background=False)
    ways: list[Callable[[int], dict[str, float]]] = [
        lambda _: _write_raw(share, folder),
        lambda number: _save(background, engine, model, number),
        lambda _: {"raw_again": _write_raw(share, folder)["raw"]},
        lambda number: {"foreground": _save(foreground, engine, model, number)["save"]},
        lambda _: {"checksum": timed(lambda: xxhash.xxh3_128(share).digest())[1]},
    ]
    figures: Figures = {"bytes": distributed.all_reduce_sum([float(len(share))])}
    for number in range(rounds + 1):
        for way in ways:
            _settle(folder)
            for name, seconds in way(number).items():
                figures.setdefault(name, []).append(seconds)
    return figures


def write_checkpoint(model: ModelConfig, stage: int, run_dir: Path) -> None:
    """Save one checkpoint of this layout in `run_dir`."""
    engine = make_engine(model, stage)
    _save(_saver(run_dir, background=False), engine, model, 1)


def measure_loads(
    model: ModelConfig, stage: int, runs: Mapping[str, Path], rounds: int
) -> dict[str, Figures]:
    """For every run of `runs`: verifying its checkpoint (every byte is hashed) and restoring it, in turns."""
    engine = make_engine(model, stage)
    figures: dict[str, Figures] = {name: {"verify": [], "restore": []} for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            engine.basic_optimizer.state.clear()  # as in an engine that has just been made
            home = Home(directory_of(runs[name]))
            found, verify = timed(functools.partial(load.find, home))
            if not found:
                raise CheckpointError(f"{home.directory} holds no checkpoint")
            _, restore = timed(functools.partial(load.resume, engine, found, OPTIM.name, None))
            figures[name]["verify"].append(verify)
            figures[name]["restore"].append(restore)
    return figures


def measure_export(run_dir: Path, out: Path, format: Format, returning: bool) -> dict[str, float]:
    """How a fresh process's resident memory grows at its peak while a checkpoint is exported (Linux, glibc).

    returning: malloc gives back at once what is freed, and what comes once in a process has come: the growth
    is then what the export holds. It else is what one sees from outside.
    """
    SavedModel(run_dir)  # imports, buffers and a first verification are paid for before
    if returning:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        export_model(run_dir, out / "before", format=format)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _memory("VmRSS"), time.perf_counter()
    export_model(run_dir, out / "measured", format=format)
    seconds = time.perf_counter() - began
    return {"bytes": _memory("VmHWM") - before, "seconds": seconds}


def _memory(field: str) -> float:
    """A field of this process's status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def measure_deepspeed_saves(model: ModelConfig, stage: int, folder: Path, rounds: int) -> Figures:
    """DeepSpeed's own save, and the sync that makes it durable, which it leaves out; the last one remains,
    under the tag "last".
    """
    engine = make_engine(model, stage)
    save = functools.partial(engine.save_checkpoint, str(folder), "last", UNIVERSAL_STATE)
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
    """DeepSpeed's own load of a checkpoint of the same layout, or of any after its conversion."""
    engine = make_engine(model, stage, {"checkpoint": {"load_universal": True}} if universal else {})
    loads = []
    for _ in range(rounds + 1):
        engine.basic_optimizer.state.clear()
        (path, _), seconds = timed(functools.partial(engine.load_checkpoint, str(folder), tag))
        loads.append(seconds)
        if path is None:
            raise CheckpointError(f"DeepSpeed loaded nothing from {folder}/{tag}")
    return {"load": loads}


def make_engine(model: ModelConfig, stage: int, deepspeed_extra: Mapping[str, Any] | None = None) -> Any:
    """An engine in mid-training: all its states exist and hold random values."""
    options = EngineConfig(zero_stage=stage, deepspeed_extra=dict(deepspeed_extra or {}))
    plan = plan_batches(distributed.world_size(), 0, distributed.world_size())
    module = build_model(model, seed=0)
    derived = deepspeed_config(options, plan, PRECISION, OPTIM.clip_norm)
    engine = engines.start_engine(module, build_optimizer(OPTIM, module), options, plan, derived)
    state.restore(engine, RandomState(), STATES, steps=1)
    engine.global_steps = 1
    return engine


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What an action returns, and the seconds that the slowest rank takes, all of them starting together."""
    distributed.barrier()
    began = time.perf_counter()
    result = action()
    return result, distributed.all_reduce_max([time.perf_counter() - began])[0]


def _num_bytes(engine: Any) -> int:
    """Of this rank's share of a checkpoint."""
    owned = state.owned_states(engine, ("fp32", *STATES))
    return sum(tensor.numel() * tensor.element_size() for part in owned.values() for tensor in part.values())


def _write_raw(share: memoryview, folder: Path) -> dict[str, float]:
    """write(2) in large blocks and fsync, to one file a rank, as fast as the file system takes it."""

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
    # Deleting old checkpoints is no part of what is timed.
    config = CheckpointConfig(keep_last=10**6, background=background)
    return Saver(Home(directory_of(run_dir)), config, OPTIM.name, ())


def _save(saver: Saver, engine: Any, model: ModelConfig, step: int) -> dict[str, float]:
    """A save, to its commit: all of it, what it blocks training for, and the writing alone."""

    def save() -> None:
        saver.save(engine, _header(engine, model, step))
        saver.wait()

    _, whole = timed(save)
    (cost,) = saver.finished()
    blocked, writing = cost["checkpoint/blocked_seconds"], cost["checkpoint/seconds"]
    blocked, writing = distributed.all_reduce_max([blocked, writing])
    return {"save": whole, "blocked": blocked, "writing": writing}


def _settle(folder: Path) -> None:
    """Start from an empty folder and no dirty pages; nobody times this."""
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        storage.fsync_directory(folder)
        os.sync()
    distributed.barrier()


def _header(engine: Any, model: ModelConfig, step: int) -> dict[str, Any]:
    """The trainer's part of a manifest."""
    return {
        "step": step,
        "samples_seen": step,
        "epoch": 0,
        "step_in_epoch": step,
        "data_fingerprint": "",
        "precision": PRECISION,
        "counters": state.counters(engine),
        "config": {"model": configs.to_dict(model)},
        "versions": {},
    }
