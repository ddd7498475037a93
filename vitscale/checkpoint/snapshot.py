"""A rank's share of the training state at one instant, and its way into a committed checkpoint.

take() is all that training waits for; write() needs nothing of the engine any more and may run in a thread.
"""

import dataclasses
import datetime
import errno
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale import distributed, storage
from vitscale.checkpoint import state, store
from vitscale.checkpoint.ema import EMA, Ema
from vitscale.checkpoint.format import (
    FIXED,
    CheckpointError,
    FileInfo,
    Manifest,
    TensorInfo,
    write_safetensors,
)
from vitscale.checkpoint.store import TEMPORARY, Home
from vitscale.config import ConfigError

T = TypeVar("T")
_ALIGNMENT = 64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HostBuffer:
    """Host memory for one snapshot, kept from save to save; pinned where there is a GPU to copy from."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, which hold until the next call."""
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if len(self._memory) < end:
            pinned = torch.cuda.is_available()
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
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
    """header: the Manifest's fields but for tensors and files. shapes: of all tensors, whole. pieces: what
    this rank holds, (name, start, count). tensors: by STATE/NAME, 1-D.
    """

    header: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    fixed: frozenset[str]
    pieces: list[tuple[str, int, int]]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def take(
    engine: Any, optimizer: str, header: dict[str, Any], ema: Ema | None, buffer: HostBuffer | None
) -> Snapshot:
    """The state of an engine between two optimizer steps; every rank calls it.

    header: the trainer's part of the Manifest. buffer: where to copy the values to; None = they are views of
    the live state.
    """
    steps = state.optimizer_steps(engine)
    states = ("fp32", *(state.OPTIMIZER_STATES[optimizer] if steps > 0 else ()))
    owned = state.owned_states(engine, states)
    if ema:
        owned[EMA] = ema.owned(engine)
    tensors = {f"{name}/{owner}": tensor for name, part in owned.items() for owner, tensor in part.items()}
    pieces = [(fragment.name, fragment.start, fragment.count) for fragment in state.fragments(engine)]
    fixed = list(state.fixed(engine))
    for piece in fixed:
        if len(piece.mine):
            tensors[f"{FIXED}/{piece.name}"] = piece.mine.detach()
            pieces.append((piece.name, piece.start, len(piece.mine)))
    return Snapshot(
        header={
            **header,
            "optimizer": optimizer,
            "optimizer_steps": steps,
            "states": tuple(owned),
            "world_size": distributed.world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "loss_scaler": state.loss_scaler(engine),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        shapes=state.shapes(engine),
        fixed=frozenset(piece.name for piece in fixed),
        pieces=pieces,
        tensors=buffer.copy(tensors) if buffer else tensors,
    )


def write(snapshot: Snapshot, home: Home, channel: ProcessGroup | None = None) -> None:
    """Write and commit a checkpoint; every rank calls it, all of them over `channel` or none.

    Raises CheckpointError on every rank if any could not write (disk full, read-only, store away): the
    previous checkpoint is then still in charge.
    """
    step = snapshot.header["step"]
    # What a rank of a dead job may still be writing must not meet what this job writes.
    token = distributed.broadcast_json(secrets.token_hex(4), channel)
    temporary = home.directory / f"{TEMPORARY}{store.step_name(step)}-{token}"
    suffix = f"-{token}" if home.store else ""
    file = f"rank-{distributed.rank():05d}{suffix}.safetensors"
    try:
        info = _together(lambda: _write_file(snapshot, temporary / file, home), temporary / file, channel)
        everyone = distributed.gather_json([file, dataclasses.asdict(info), snapshot.pieces], channel)
        manifest = _manifest(snapshot, everyone)
        _together(lambda: _commit(manifest, temporary, home), temporary, channel)
    except CheckpointError:  # on all ranks; after any other error one of them may still be at work in there
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if home.store:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(snapshot: Snapshot, path: Path, home: Home) -> FileInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = write_safetensors(path, snapshot.tensors, {"format": "pt"})
    if home.store:
        folder = store.step_folder(home.store, snapshot.header["step"])
        storage.upload(path, storage.child(folder, path.name))
    else:
        storage.fsync_directory(path.parent)
    return info


def _commit(manifest: Manifest, temporary: Path, home: Home) -> None:
    if distributed.is_main():
        if home.store:
            store.publish(manifest, home.store)
        else:
            store.commit(manifest, temporary, store.step_directory(home.directory, manifest.step))


def _manifest(snapshot: Snapshot, everyone: list[Any]) -> Manifest:
    fragments: dict[str, list[tuple[str, int, int]]] = {name: [] for name in snapshot.shapes}
    for file, _, pieces in everyone:
        for name, start, count in pieces:
            fragments[name].append((file, start, count))
    return Manifest(
        **snapshot.header,
        tensors={
            name: TensorInfo(shape=shape, fragments=tuple(fragments[name]), fixed=name in snapshot.fixed)
            for name, shape in snapshot.shapes.items()
        },
        files={file: FileInfo(**info) for file, info, _ in everyone},
    )


def _together(action: Callable[[], T], path: Path, channel: ProcessGroup | None) -> T:
    """Run a local action on every rank, and fail on every rank if it failed on any."""
    result, failure = None, ""
    try:
        result = action()
    except OSError as error:
        failure = _sentence(error, path)
    except (ConfigError, CheckpointError) as error:
        failure = f"{error}; the last checkpoint is intact"
    failures = [text for text in distributed.gather_json(failure, channel) if text]
    if failures:
        raise CheckpointError(failures[0])
    return result  # pyright: ignore[reportReturnType] (None only after a failure)


def _sentence(error: OSError, path: Path) -> str:
    free = ""
    if error.errno in _NO_SPACE:
        usage = shutil.disk_usage(next(folder for folder in path.parents if folder.exists()))
        free = f" ({usage.free / 1e9:,.2f} of {usage.total / 1e9:,.2f} GB free there)"
    return (
        f"saving {path} failed: {error.strerror or error}{free}; the last checkpoint is intact: free space "
        "(or lower checkpoint.keep_last) or mend the path, and start again"
    )
