"""Reading a checkpoint at any world size and ZeRO stage: each rank reads what it owns now."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitscale import distributed
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.safetensors import SafetensorsReader
from vitscale.checkpoint.store import Home
from vitscale.checkpoint.verify import Checkpoint, first_untried, newest_good, together
from vitscale.engine.engine import Engine
from vitscale.engine.fragments import FP32, UNTRAINED, Wanted
from vitscale.errors import CheckpointError
from vitscale.stores import storage


class FragmentReader:
    """A FragmentSource that reads a committed checkpoint, in a folder or a store."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._files: dict[str, SafetensorsReader] = {}  # of read_into

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Read everything, one file after another."""
        ranges: dict[str, list[tuple[Tensor, str, int]]] = {}
        for each in wanted:
            for file, part, key, first in self.ranges(each):
                ranges.setdefault(file, []).append((part, key, first))
        for file in sorted(ranges):
            with self._still_there():
                SafetensorsReader(storage.child(self._folder, file)).read(ranges[file])

    def read_into(self, destination: Tensor, slot: str, name: str, start: int) -> None:
        """As read, for one; the headers of its files are kept for the next one."""
        for file, part, key, first in self.ranges(Wanted(destination, slot, name, start)):
            reader = self._open(file)
            with self._still_there():
                reader.read_into(part, key, first)

    def ranges(self, wanted: Wanted) -> list[tuple[str, Tensor, str, int]]:
        """The (file, destination, tensor of the file, start in it) that make up what is wanted.

        Only the parts of fragments that overlap are read. For example, of a tensor of 10 values
        in fragments (0, 4), (4, 4) and (8, 2), a rank now owns 5 values from start = 3:

            first fragment     value  3       to destination[0:1]
            second fragment    values 4-7     to destination[1:5]
            third fragment     is not read

        An untrained tensor has one slot, which is read whatever the wanted slot is.
        """
        destination, slot, name, start = wanted
        key = f"{UNTRAINED if self._manifest.tensors[name].untrained else slot}/{name}"
        end, num_values, ranges = start + len(destination), 0, []
        for file, first, count in self._manifest.overlapping(name, start, end):
            low, high = max(first, start), min(first + count, end)
            ranges.append((file, destination[low - start : high - start], key, low - first))
            num_values += high - low
        if num_values != len(destination):
            raise CheckpointError(
                f"{self._folder}: {slot} of {name} is incomplete: {num_values:,} of {len(destination):,} "
                "values"
            )
        return ranges

    def dtype(self, name: str, slot: str) -> torch.dtype | None:
        """Of a slot of a tensor in the files; None if they lack it.

        Muon has no second moment of matrices, and an untrained tensor one slot, "fixed".
        """
        key, tensor = f"{slot}/{name}", self._manifest.tensors[name]
        if not tensor.fragments or tensor.untrained != (slot == UNTRAINED):
            return None
        reader = self._open(self._manifest.file_names[tensor.fragments[0].file])
        return reader.dtype(key) if slot in (FP32, UNTRAINED) or key in reader.header else None

    def whole(self, name: str, slot: str = "fp32") -> Tensor:
        """One whole tensor in fp32; a buffer of integers or booleans keeps its dtype."""
        tensor, saved = self._manifest.tensors[name], self.dtype(name, UNTRAINED)
        dtype = torch.float32 if saved is None or saved.is_floating_point else saved
        whole = torch.empty(tensor.shape, dtype=dtype)
        self.read_into(whole.view(-1), slot, name, 0)
        return whole

    def _open(self, file: str) -> SafetensorsReader:
        if file not in self._files:
            with self._still_there():
                self._files[file] = SafetensorsReader(storage.child(self._folder, file))
        return self._files[file]

    @contextlib.contextmanager
    def _still_there(self) -> Iterator[None]:
        """Says of a missing file that its checkpoint, which was verified, has been deleted."""
        try:
            yield
        except FileNotFoundError:
            raise CheckpointError(
                f"{self._folder} was deleted while it was read, as a run does that saves newer ones; run the "
                "same command again, or name a step that is kept"
            ) from None


def find(home: Home) -> Checkpoint | None:
    """The newest good checkpoint of a run, or None if it has none yet; every rank calls it.

    Raises CheckpointError if there are some and none passes, and StoreError if they cannot be
    read: a store that does not answer says nothing about what it holds.
    """

    def untried(failed: Collection[str]) -> str:
        return distributed.on_main(lambda: first_untried(home.committed(), failed))

    with distributed.alike():
        return newest_good(untried, home.place, together)


def resume(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the saved state into a fresh engine; every rank calls it.

    State belongs to parameters by name, not to parameter groups: learning rate and weight decay
    come from the config. If the checkpoint has no average, the average starts at the weights.
    Raises CheckpointError if the model, the optimizer or the frozen parameters differ.
    """
    manifest = checkpoint.manifest
    with distributed.alike():
        untrained = {tensor.name for tensor in engine.untrained()}
        check_fits(checkpoint, engine.shapes(), untrained, engine.optimizer_name)
        if manifest.counters.updates:
            for statistic in engine.statistics():
                info = manifest.tensors.get(statistic.name)
                if info is None or not info.untrained or info.shape != (len(statistic.held),):
                    raise CheckpointError(
                        f"{checkpoint.folder} lacks the optimizer's {statistic.name}, or has it in another "
                        "form; start from its weights alone: [init] checkpoint without full_state"
                    )
    reader = FragmentReader(checkpoint.folder, manifest)
    engine.restore(reader, manifest.slots, manifest.counters, manifest.loss_scaler)


def check_fits(
    checkpoint: Checkpoint, ours: Mapping[str, tuple[int, ...]], untrained: Collection[str], optimizer: str
) -> None:
    """Raise CheckpointError unless the checkpoint has a run's tensors and optimizer.

    ours: the whole shapes of the run's parameters and persistent buffers, of which `untrained`
    are the buffers and the frozen parameters. The same must be frozen in both.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    saved = {name: info.shape for name, info in manifest.of_model.items()}
    if saved != ours:
        name = min(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
        raise CheckpointError(
            f"{folder} is of another model: {name} is {saved.get(name)} in it "
            f"and {ours.get(name)} in this run"
        )
    for name, info in manifest.of_model.items():
        if info.untrained != (name in untrained):  # the moments would be missing, or have no place
            before, now = ("frozen", "trained") if info.untrained else ("trained", "frozen")
            raise CheckpointError(
                f"{folder} does not fit optim.freeze: {name} was {before} in that run and is {now} in this "
                "one; set optim.freeze to what that run had, or start from its weights alone: "
                "[init] checkpoint without full_state"
            )
    if manifest.optimizer != optimizer:
        raise CheckpointError(
            f'{folder} holds the state of optim.name = "{manifest.optimizer}", not of '
            f'"{optimizer}"; set it to that, or start from its weights alone: '
            "[init] checkpoint without full_state"
        )
