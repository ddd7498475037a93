"""Reading a checkpoint at any world size and ZeRO stage: each rank reads the ranges that it owns now, and no
others.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.checkpoint import state, store
from vitscale.checkpoint.format import CheckpointError, Manifest, SafetensorsReader


class FragmentReader:
    """A committed checkpoint as a source of ranges (state.FragmentSource)."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._files: dict[str, SafetensorsReader] = {}

    def read_into(self, destination: Tensor, state: str, name: str, start: int) -> None:
        """destination[:] = the saved `state` of parameter `name`, flattened, from `start`; only overlapping
        ranges are read.
        """
        end, found = start + len(destination), 0
        for file, first, count in self._manifest.tensors[name].fragments:
            low, high = max(first, start), min(first + count, end)
            if low < high:
                if file not in self._files:
                    self._files[file] = SafetensorsReader(self._directory / file)
                self._files[file].read_into(
                    destination[low - start : high - start], f"{state}/{name}", low - first
                )
                found += high - low
        if found != len(destination):
            raise CheckpointError(
                f"{self._directory}: {state} of {name} is incomplete: {found:,} of {len(destination):,} "
                "values"
            )

    def whole(self, name: str, state: str = "fp32") -> Tensor:
        """One whole tensor, fp32."""
        shape = self._manifest.tensors[name].shape
        flat = torch.empty(store.numel(shape))
        self.read_into(flat, state, name, 0)
        return flat.view(shape)


def find(run_dir: str) -> tuple[Path, Manifest] | None:
    """The newest good checkpoint of a run, looked for by rank 0 and agreed by all. None if the run has none
    yet.
    """
    chosen, failure = "", ""
    if distributed.is_main():
        try:
            newest = store.newest_good(store.directory_of(run_dir))
            chosen = str(newest[0]) if newest else ""
        except CheckpointError as error:
            failure = str(error)
    chosen, failure = distributed.broadcast_json([chosen, failure])
    if failure:
        raise CheckpointError(failure)
    return (Path(chosen), Manifest.load(Path(chosen))) if chosen else None


def resume(engine: Any, directory: Path, manifest: Manifest) -> None:
    """Put the saved state into a fresh engine; every rank calls it. Raises CheckpointError if it is of
    another model.
    """
    saved, here = {name: info.shape for name, info in manifest.tensors.items()}, state.shapes(engine)
    if saved != here:
        names = sorted(name for name in {*saved, *here} if saved.get(name) != here.get(name))
        raise CheckpointError(
            f"{directory} is of another model: {names[0]} is {saved.get(names[0])} there and "
            f"{here.get(names[0])} here"
        )
    reader = FragmentReader(directory, manifest)
    state.restore(engine, reader, manifest.states[1:], manifest.optimizer_steps)
    engine_counters = {name: manifest.counters[name] for name in state.COUNTERS}
    state.restore_counters(engine, engine_counters, manifest.loss_scaler)
