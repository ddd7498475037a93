"""A checkpoint cut again for another number of ranks.

Any world size reads any checkpoint as it lies: this is for shipping, where as many files as there are
machines, or a single one, are handier.
"""

import dataclasses
import math
import os
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from vitscale import storage
from vitscale.checkpoint.format import (
    FIXED,
    MANIFEST,
    CheckpointError,
    FileInfo,
    Manifest,
    SafetensorsReader,
    SafetensorsWriter,
)
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.verify import open_directory
from vitscale.checkpoint.weights import export_at


def reshard(checkpoint: str, out: str, world_size: int) -> Path:
    """Write the step directory `out`: `checkpoint` (a run or step directory) with every tensor of every state
    cut for `world_size` ranks as ZeRO 3 cuts it. One fragment is in memory at a time.

    Nothing has the name `out` until all of it is on disk. Raises CheckpointError for bad arguments and for a
    checkpoint that is damaged.
    """
    if not storage.is_local(out):
        raise CheckpointError(f"{out} is in a store: write into a folder, and copy it to where it goes")
    target = Path(storage.local_path(out))
    if world_size < 1:
        raise CheckpointError(f"--world {world_size} must be 1 or more: it is the number of files to write")
    if target.exists():
        raise CheckpointError(f"{out} exists and is not overwritten; choose another name, or delete it first")
    if export_at(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is an export: it holds weights alone; give a run or step directory"
        )
    source, manifest = open_directory(checkpoint)
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{out} lies inside {source}, which is what to read; choose a place beside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        _write(source, manifest, temporary, world_size)
        os.rename(temporary, target)
    except BaseException:  # Ctrl-C, too, leaves nothing behind; raised again
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    storage.fsync_directory(target.parent)
    return target


def piece(num_values: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and count of a rank's fragment of a flattened tensor under ZeRO 3: ceil(values / ranks) each, as
    long as there are any.
    """
    each = -(-num_values // world_size)
    start = min(rank * each, num_values)
    return start, min(each, num_values - start)


def _write(source: str, manifest: Manifest, folder: Path, world_size: int) -> None:
    reader, dtypes = FragmentReader(source, manifest), _dtypes(source, manifest)
    fragments: dict[str, list[tuple[str, int, int]]] = {name: [] for name in manifest.tensors}
    files: dict[str, FileInfo] = {}
    for rank in tqdm(range(world_size), unit="file", desc="writing", leave=False, disable=None):
        file = f"rank-{rank:05d}.safetensors"
        pieces = {
            name: piece(math.prod(info.shape), rank, world_size) for name, info in manifest.tensors.items()
        }
        mine = [(state, name) for state, name in dtypes if pieces[name][1]]
        shapes = {f"{state}/{name}": ((pieces[name][1],), dtypes[state, name]) for state, name in mine}
        with SafetensorsWriter(folder / file, shapes, {"format": "pt"}) as writer:
            for state, name in mine:
                start, count = pieces[name]
                values = torch.empty(count, dtype=dtypes[state, name])
                reader.read_into(values, state, name, start)
                writer.write(f"{state}/{name}", values)
        files[file] = writer.info
        for name in {name: None for _, name in mine}:
            fragments[name].append((file, *pieces[name]))
    tensors = {
        name: dataclasses.replace(info, fragments=tuple(fragments[name]))
        for name, info in manifest.tensors.items()
    }
    dataclasses.replace(manifest, world_size=world_size, zero_stage=3, tensors=tensors, files=files).save(
        folder / MANIFEST
    )
    storage.fsync_directory(folder)


def _dtypes(source: str, manifest: Manifest) -> dict[tuple[str, str], torch.dtype]:
    """The dtype of each (state, tensor) that the files hold, state by state."""
    readers: dict[str, SafetensorsReader] = {}
    found: dict[tuple[str, str], torch.dtype] = {}
    for state in (*manifest.states, FIXED):
        for name, info in manifest.tensors.items():
            if info.fragments and info.fixed == (state == FIXED):
                file = info.fragments[0][0]
                if file not in readers:
                    readers[file] = SafetensorsReader(storage.child(source, file))
                found[state, name] = readers[file].dtype(f"{state}/{name}")
    return found
