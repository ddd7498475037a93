"""Writing a checkpoint again with another number of files.

Any world size can read any checkpoint as it is. This is for shipping one: a single file, or one
file per machine, is easier to copy.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vitscale.checkpoint import store
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import MANIFEST, Manifest, joined, numbered
from vitscale.checkpoint.safetensors import FileInfo, SafetensorsWriter
from vitscale.checkpoint.verify import open_directory
from vitscale.engine.fragments import UNTRAINED
from vitscale.errors import CheckpointError
from vitscale.stores import storage
from vitscale.system import atomic

MAX_FILES = 100_000  # ranks have five digits in the names


def reshard(checkpoint: str, out: str, world_size: int) -> Path:
    """Write a checkpoint (a run or step directory) as the step directory `out`.

    Every slot of every tensor is cut for `world_size` ranks as ZeRO 3 would cut it, with one
    fragment in memory at a time. Nothing has the name `out` until all of it is on disk. Raises
    CheckpointError for bad arguments and for a damaged checkpoint, and ConfigError for an `out`
    in a store.
    """
    target = storage.local_output(out)
    if not 1 <= world_size <= MAX_FILES:
        raise CheckpointError(
            f"--world {world_size} must be from 1 to {MAX_FILES:,}: it is the number of files to write"
        )
    if target.exists():
        raise CheckpointError(f"{out} exists and is not overwritten; choose another name, or delete it first")
    found = open_directory(checkpoint)
    source, manifest = found.folder, found.manifest
    if store.step_of(out) not in (None, manifest.step):
        raise CheckpointError(
            f"{out} is the name of another step, but {source} is step {manifest.step:,}; write "
            f"{storage.join(out, store.step_name(manifest.step))}"
        )
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{out} lies inside {source}, which is being read; choose a folder outside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.appearing(target) as temporary:
        temporary.mkdir()
        _write(source, manifest, temporary, world_size)
    return target


def piece(num_values: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and count of a rank's fragment of a flattened tensor under ZeRO 3.

    Each rank takes ceil(values / ranks) as long as there are any: 10 values on 4 ranks are
    (0, 3), (3, 3), (6, 3) and (9, 1); 5 values are (0, 2), (2, 2), (4, 1) and (5, 0).
    """
    each = -(-num_values // world_size)
    start = min(rank * each, num_values)
    return start, min(each, num_values - start)


def _write(source: str, manifest: Manifest, folder: Path, world_size: int) -> None:
    reader = FragmentReader(source, manifest)
    slots = [(slot, name) for slot in (*manifest.slots, UNTRAINED) for name in manifest.tensors]
    dtypes = {(slot, name): dtype for slot, name in slots if (dtype := reader.dtype(name, slot))}
    names = [f"rank-{rank:05d}.safetensors" for rank in range(world_size)]
    numbers = numbered(names)
    written: dict[str, list[tuple[int, int, int]]] = {name: [] for name in manifest.tensors}
    files: dict[str, FileInfo] = {}
    for rank, file in enumerate(tqdm(names, unit="file", desc="writing", leave=False, disable=None)):
        pieces = {
            name: piece(math.prod(info.shape), rank, world_size) for name, info in manifest.tensors.items()
        }
        mine = [(slot, name) for slot, name in dtypes if pieces[name][1]]
        shapes = {f"{slot}/{name}": ((pieces[name][1],), dtypes[slot, name]) for slot, name in mine}
        with SafetensorsWriter(folder / file, shapes, {"format": "pt"}) as writer:
            for slot, name in mine:
                start, count = pieces[name]
                values = torch.empty(count, dtype=dtypes[slot, name])
                reader.read_into(values, slot, name, start)
                writer.write(f"{slot}/{name}", values)
        files[file] = writer.info
        for name in {name: None for _, name in mine}:
            written[name].append((numbers[file], *pieces[name]))
    tensors = {
        name: dataclasses.replace(info, fragments=joined(np.array(written[name]).reshape(-1, 3)))
        for name, info in manifest.tensors.items()
    }
    dataclasses.replace(manifest, world_size=world_size, zero_stage=3, tensors=tensors, files=files).save(
        folder / MANIFEST
    )
