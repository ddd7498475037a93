"""A rank's share of the training state at one instant, and how it becomes a checkpoint.

Training waits for take() only; write() does not need the engine and may run in a thread.
"""

import dataclasses
import datetime
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale import distributed
from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import Fragments, Manifest, TensorInfo, TrainState, joined, numbered
from vitscale.checkpoint.safetensors import FileInfo, write_safetensors
from vitscale.checkpoint.store import TEMPORARY, Home
from vitscale.engine.engine import Engine
from vitscale.engine.fragments import UNTRAINED
from vitscale.errors import StoreError, UserError
from vitscale.quantities import size_text
from vitscale.stores import storage
from vitscale.system import atomic

T = TypeVar("T")
_ALIGNMENT = 64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HostBuffer:
    """Host memory for one snapshot, reused by every save; pinned if a GPU copies to it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, valid until the next call."""
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT  # rounded up
        if len(self._memory) < end:
            pinned = torch.cuda.is_available()
            self._memory = torch.empty(0, dtype=torch.uint8)  # frees the old memory before the new one
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        copies = {}
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            part = self._memory[starts[name] : starts[name] + size]
            copies[name] = part.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What this rank writes.

    manifest: of the checkpoint, without files and fragments, which all ranks together have.
    pieces: (name, start, count) of each fragment that this rank has.
    tensors: the 1-D values of these fragments, by SLOT/NAME.
    """

    manifest: Manifest
    pieces: list[tuple[str, int, int]]
    tensors: dict[str, Tensor]


def take(engine: Engine, train: TrainState, buffer: HostBuffer | None) -> Snapshot:
    """The state of an engine between two optimizer steps; every rank calls it.

    buffer: where to copy the values; None = they are views of the live state.
    """
    owned = engine.owned()
    tensors = {f"{slot}/{name}": tensor for slot, part in owned.items() for name, tensor in part.items()}
    pieces = [(fragment.name, fragment.start, fragment.count) for fragment in engine.fragments()]
    statistics = list(engine.statistics())
    untrained = [*engine.untrained(), *statistics]
    for tensor in untrained:
        if len(tensor.mine):
            tensors[f"{UNTRAINED}/{tensor.name}"] = tensor.mine.detach()
            pieces.append((tensor.name, tensor.start, len(tensor.mine)))
    shapes = {**engine.shapes(), **{each.name: (len(each.held),) for each in statistics}}
    fixed = {tensor.name for tensor in untrained}
    manifest = Manifest(
        train=train,
        optimizer=engine.optimizer_name,
        slots=tuple(owned),
        counters=engine.counters,
        loss_scaler=engine.loss_scaler,
        world_size=distributed.world_size(),
        zero_stage=engine.zero_stage,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tensors={
            name: TensorInfo(shape=shape, fragments=(), untrained=name in fixed)
            for name, shape in shapes.items()
        },
        files={},
    )
    return Snapshot(manifest=manifest, pieces=pieces, tensors=buffer.copy(tensors) if buffer else tensors)


def write(snapshot: Snapshot, home: Home, channel: ProcessGroup | None = None) -> None:
    """Write and commit a checkpoint; every rank calls it, all with a channel or all without.

    Raises a UserError on every rank if any of them could not write (disk full, read-only, no
    answer from the store). The previous checkpoint is then still the newest.
    """
    # A rank of a dead job may still be writing the same step: the token keeps its files apart.
    token = distributed.broadcast_json(secrets.token_hex(4), channel)
    temporary = home.directory / f"{TEMPORARY}{store.step_name(snapshot.manifest.step)}-{token}"
    suffix = f"-{token}" if home.store else ""
    file = f"rank-{distributed.rank():05d}{suffix}.safetensors"
    path = temporary / file
    try:
        info = distributed.together(lambda: _saving(path, lambda: _write_file(snapshot, path, home)), channel)
        files = distributed.gather_json_to_main([file, dataclasses.asdict(info)], channel)
        pieces = distributed.gather_rows_to_main(_pieces(snapshot), channel)

        def commit() -> None:
            if distributed.is_main():
                _commit(assemble(snapshot, files, pieces), temporary, home)

        distributed.together(lambda: _saving(temporary, commit), channel)
    except UserError:  # raised on all ranks; after any other error, one may still be writing there
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if home.store:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(snapshot: Snapshot, path: Path, home: Home) -> FileInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = write_safetensors(path, snapshot.tensors, {"format": "pt"})
    if home.store:
        folder = store.step_folder(home.store, snapshot.manifest.step)
        storage.upload(path, storage.child(folder, path.name))
    else:
        atomic.sync_folder(path.parent)
    return info


def _commit(manifest: Manifest, temporary: Path, home: Home) -> None:
    if home.store:
        store.publish(manifest, home.store)
    else:
        store.commit(manifest, temporary, store.step_directory(home.directory, manifest.step))


def _pieces(snapshot: Snapshot) -> Int64[Tensor, "n 3"]:
    """The pieces of this rank, as in assemble."""
    numbers = {name: number for number, name in enumerate(snapshot.manifest.tensors)}
    rows = [(numbers[name], start, count) for name, start, count in snapshot.pieces]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def assemble(snapshot: Snapshot, files: list[Any], pieces: list[Tensor]) -> Manifest:
    """The manifest of what all ranks wrote.

    files: for each rank, the name of its file and the values of its FileInfo.
    pieces: for each rank, rows of (number of the tensor in the manifest, start, count).
    """
    infos = {name: FileInfo(**info) for name, info in files}
    numbers, tensors = numbered(infos), snapshot.manifest.tensors
    of_tensors = _by_tensor([numbers[name] for name, _ in files], pieces, len(tensors))
    tensors = {
        name: dataclasses.replace(info, fragments=fragments)
        for (name, info), fragments in zip(tensors.items(), of_tensors, strict=True)
    }
    return dataclasses.replace(snapshot.manifest, tensors=tensors, files=infos)


def _by_tensor(files: list[int], pieces: list[Tensor], num_tensors: int) -> list[tuple[Fragments, ...]]:
    """The fragments of each tensor. files: the number of each rank's file; pieces: its rows."""
    rows = np.concatenate([part.numpy() for part in pieces])  # [n, 3]
    rows = np.column_stack([np.repeat(files, [len(part) for part in pieces]), rows])  # [n, 4]
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    ends = np.searchsorted(rows[:, 1], np.arange(num_tensors), side="right")
    return [joined(part[:, [0, 2, 3]]) for part in np.split(rows, ends)[:num_tensors]]


def _saving(path: Path, action: Callable[[], T]) -> T:
    """Run a part of a save; its errors also say that the last checkpoint is intact."""
    try:
        return action()
    except OSError as error:
        raise StoreError(_sentence(error, path)) from None
    except UserError as error:
        raise type(error)(f"{error}; the last checkpoint is intact") from None


def _sentence(error: OSError, path: Path) -> str:
    free = ""
    if error.errno in _NO_SPACE:
        folder = next(folder for folder in path.parents if folder.exists())
        usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
        free = f" ({size_text(usage.free)} of {size_text(usage.total)} free there)"
        if inodes.f_files and not inodes.f_favail:
            free = " (no inode is free there: delete files)"
    return (
        f"saving {path} failed: {error.strerror or error}{free}; the last checkpoint is intact: free space "
        "(or lower checkpoint.keep_last) or fix the path, and start again"
    )
