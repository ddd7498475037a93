"""Reading a checkpoint at any world size and ZeRO stage: each rank reads the ranges that it owns now, and no
others.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitscale import distributed, storage
from vitscale.checkpoint import state, store
from vitscale.checkpoint.ema import EMA, Ema
from vitscale.checkpoint.format import FIXED, MANIFEST, CheckpointError, Manifest, SafetensorsReader
from vitscale.checkpoint.store import Home
from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class FragmentReader:
    """A committed checkpoint, in a folder or a store, as a source of ranges (state.FragmentSource)."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._files: dict[str, SafetensorsReader] = {}

    def read_into(self, destination: Tensor, state: str, name: str, start: int) -> None:
        """destination[:] = the saved `state` of tensor `name`, flattened, from `start`; only overlapping
        ranges are read. What is fixed has one state, whichever is asked for.
        """
        tensor = self._manifest.tensors[name]
        key = f"{FIXED if tensor.fixed else state}/{name}"
        end, found = start + len(destination), 0
        for file, first, count in tensor.fragments:
            low, high = max(first, start), min(first + count, end)
            if low < high:
                self._open(file).read_into(destination[low - start : high - start], key, low - first)
                found += high - low
        if found != len(destination):
            raise CheckpointError(
                f"{self._folder}: {state} of {name} is incomplete: {found:,} of {len(destination):,} values"
            )

    def whole(self, name: str, state: str = "fp32") -> Tensor:
        """One whole tensor, fp32; a buffer of integers as it is."""
        tensor = self._manifest.tensors[name]
        dtype = torch.float32
        if tensor.fixed and tensor.fragments:
            saved = self._open(tensor.fragments[0][0]).dtype(f"{FIXED}/{name}")
            dtype = dtype if saved.is_floating_point else saved
        flat = torch.empty(store.numel(tensor.shape), dtype=dtype)
        self.read_into(flat, state, name, 0)
        return flat.view(tensor.shape)

    def _open(self, file: str) -> SafetensorsReader:
        if file not in self._files:
            self._files[file] = SafetensorsReader(storage.child(self._folder, file))
        return self._files[file]


@dataclasses.dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies: its folder or URL. passed_over: newer steps, which did not."""

    folder: str
    manifest: Manifest
    passed_over: tuple[int, ...]


def find(home: Home) -> Found | None:
    """The newest good checkpoint of a run; every rank calls it and checks its share of the files. None if the
    run has none yet.

    Raises CheckpointError if it has some, but none of them verifies, and StoreError or CheckpointError where
    they cannot be read at all: a store that does not answer says nothing about what it holds.
    """
    return _newest_good(on_main(home.committed), home.store or str(home.directory))


def _newest_good(candidates: Sequence[tuple[int, str]], where: str) -> Found | None:
    passed_over, problems = [], []
    for step, folder in candidates:
        problem = _verify_together(folder)
        if not problem:
            return Found(folder, Manifest.load(folder), tuple(passed_over))
        passed_over.append(step)
        problems.append(problem)
        if distributed.is_main():
            logger.warning("checkpoint passed over: %s", problem)
    if problems:
        raise store.none_verifies(where, problems[0])
    return None


def verified(path: str) -> Found:
    """The newest good checkpoint of another run, or a step directory of it, in a folder or a store; every
    rank calls it. Raises CheckpointError if there is none.
    """
    names = set(on_main(lambda: storage.names_in(path)))
    if MANIFEST in names:
        problem = _verify_together(path)
        if problem:
            raise CheckpointError(problem)
        return Found(path, Manifest.load(path), ())
    place = str(store.directory_of(path)) if storage.is_local(path) else store.child_of_run(path)
    steps = on_main(lambda: store.steps_on_disk(place))
    found = _newest_good([(step, store.step_folder(place, step)) for step in reversed(steps)], place)
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint with the state of training: give a run directory or a step directory"
        )
    return found


def on_main(action: Callable[[], T]) -> T:
    """Rank 0's JSON-able result on every rank, or its error, as a CheckpointError; every rank calls it."""
    result, failure = None, ""
    if distributed.is_main():
        try:
            result = action()
        except (OSError, ConfigError, CheckpointError) as error:
            failure = str(error)
    result, failure = distributed.broadcast_json([result, failure])
    if failure:
        raise CheckpointError(failure)
    return result


def _verify_together(folder: str) -> str:
    """What is wrong with a checkpoint, as a sentence; "" if nothing. Each rank hashes its share of the
    files.
    """
    problem, unreadable, seen = "", "", ""
    try:
        manifest = Manifest.load(folder)
        seen = manifest.digest()
        problem = store.check_coverage(folder, manifest)
        for name in sorted(manifest.files)[distributed.rank() :: distributed.world_size()]:
            problem = problem or store.check_file(folder, name, manifest.files[name])
    except CheckpointError as error:
        problem = str(error)
    except (PermissionError, ConfigError) as error:
        unreadable = str(error)
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read: {error.strerror}"
    everyone = distributed.gather_json([problem, unreadable, seen])
    for _, text, _ in everyone:
        if text:
            raise CheckpointError(f"{folder} cannot be read: {text}")
    for rank, (text, _, manifest_seen) in enumerate(everyone):
        if not text and manifest_seen != everyone[0][2]:
            return f"{folder} is not the same for ranks 0 and {rank}: run_dir must be shared by all nodes"
    return next((text for text, _, _ in everyone if text), "")


def resume(engine: Any, found: Found, optimizer: str, ema: Ema | None) -> None:
    """Put the saved state into a fresh engine; every rank calls it. Raises CheckpointError if it is of
    another model or optimizer, or if other parameters are frozen in it.

    What the parameter groups say (learning rate, weight decay) is the config's business: state belongs to
    parameters by their names, not to groups. An average that the checkpoint does not hold begins at its
    weights.
    """
    directory, manifest = found.folder, found.manifest
    saved, here = {name: info.shape for name, info in manifest.tensors.items()}, state.shapes(engine)
    if saved != here:
        names = sorted(name for name in {*saved, *here} if saved.get(name) != here.get(name))
        raise CheckpointError(
            f"{directory} is of another model: {names[0]} is {saved.get(names[0])} there and "
            f"{here.get(names[0])} here"
        )
    frozen = {piece.name for piece in state.fixed(engine)}
    for name, info in manifest.tensors.items():
        if info.fixed != (name in frozen):  # there are no moments for it there, or no place for them here
            there, now = ("frozen", "trained") if info.fixed else ("trained", "frozen")
            raise CheckpointError(
                f"{directory} does not fit optim.freeze: {name} is {there} there and {now} here; set it to "
                "what that run had, or start from its weights alone: [init] checkpoint without full_state"
            )
    if manifest.optimizer != optimizer:
        raise CheckpointError(
            f'{directory} holds the state of optim.name = "{manifest.optimizer}", not of "{optimizer}"; set '
            "it "
            "to that, or start from its weights alone: [init] checkpoint without full_state"
        )
    reader = FragmentReader(directory, manifest)
    states = [name for name in manifest.states if name not in ("fp32", EMA)]
    state.restore(engine, reader, states, manifest.optimizer_steps)
    engine_counters = {name: manifest.counters[name] for name in state.COUNTERS}
    state.restore_counters(engine, engine_counters, manifest.loss_scaler)
    if ema:  # after the counters: it notes the step, so that one that is skipped then does not count
        ema.restore(engine, reader, EMA if EMA in manifest.states else "fp32")
