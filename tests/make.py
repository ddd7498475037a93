"""Small real files for the tests: JPEGs, tars, shards with their index, and checkpoints."""

import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import Manifest, TensorInfo, TrainState, joined
from vitscale.checkpoint.safetensors import write_safetensors
from vitscale.checkpoint.store import Home
from vitscale.checkpoint.verify import Checkpoint, alone, first_untried, newest_good, open_directory
from vitscale.data.indexing import build_index
from vitscale.engine.fragments import Counters

# A checkpoint's tensors. Every trained one has all states; the sizes fall oddly between ranks.
STATES = ("fp32", "exp_avg", "exp_avg_sq", "ema")
SHAPES = {"patch.weight": (7, 11), "norm.bias": (3,), "scale": (), "head.weight": (5, 8)}
# What is not trained: a frozen parameter, a buffer of integers, and one of truth values.
FIXED = {
    "pos_embed": torch.linspace(-1, 1, 10).view(2, 5),
    "count": torch.tensor(2**40 + 1),
    "mask": torch.tensor([True, False, True]),
}
CONFIG: dict[str, Any] = {
    "run_dir": "runs/a",
    "seed": 3,
    "model": {"variant": "Ti/4", "width": 16},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "engine": {"zero_stage": 1},
    "evals": {},
}


def jpeg(seed: int, size: int = 16) -> bytes:
    """A square JPEG that differs for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of (name, content) pairs."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: Sequence[int], num_classes: int = 5, size: int = 16) -> list[str]:
    """Shards with these numbers of samples; sample i of the set has class i % num_classes."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = itertools.count()
    paths = []
    for shard, count in enumerate(counts):
        members = []
        for sample in itertools.islice(ids, count):
            members += [
                (f"s{sample:05d}.jpg", jpeg(sample, size)),
                (f"s{sample:05d}.cls", str(sample % num_classes).encode()),
            ]
        paths.append(str(write_tar(folder / f"train-{shard:06d}.tar", members)))
    return paths


def write_index(
    folder: Path, counts: Sequence[int], chunk_samples: int = 4, num_classes: int = 5, size: int = 16
) -> Path:
    """The shards of write_shards and their index.json, whose path is returned."""
    shards = write_shards(folder, counts, num_classes, size)
    path = folder / "index.json"
    build_index(shards, chunk_samples=chunk_samples).save(path)
    return path


def state_of(step: int) -> dict[tuple[str, str], Tensor]:
    """(state, name) to the whole tensor, with other values at every step."""
    generator = torch.Generator().manual_seed(step)
    trained = {
        (state, name): torch.randn(shape, generator=generator)
        for state in STATES
        for name, shape in SHAPES.items()
    }
    return {**trained, **{("fixed", name): tensor for name, tensor in FIXED.items()}}


def write_step(
    run: Path, step: int, tensors: dict[tuple[str, str], Tensor], *, world_size: int = 3, **header: Any
) -> Path:
    """A committed checkpoint RUN/checkpoints/step-...; its folder is returned.

    tensors: as in state_of, of any names. Each is cut at random places among the ranks, some of
    which may get nothing of it. header: replaces values of the manifest.
    """
    folder = store.step_directory(store.directory_of(run), step)
    folder.mkdir(parents=True)
    shapes = {name: tuple(tensor.shape) for (_, name), tensor in tensors.items()}
    untrained = {name for state, name in tensors if state == "fixed"}
    cuts = {name: _cuts(tensor.numel(), world_size, step) for (_, name), tensor in tensors.items()}
    files, written = {}, {name: [] for name in shapes}
    for rank in range(world_size):
        file = f"rank-{rank:05d}.safetensors"
        owned = {name: cuts[name][rank] for name in shapes if cuts[name][rank][1]}
        pieces = {
            f"{state}/{name}": tensor.reshape(-1).narrow(0, *owned[name])
            for (state, name), tensor in tensors.items()
            if name in owned
        }
        files[file] = write_safetensors(folder / file, pieces, {"format": "pt"})
        for name, (start, count) in owned.items():
            written[name].append((rank, start, count))
    infos = {
        name: TensorInfo(
            shape=shape,
            fragments=joined(np.array(written[name]).reshape(-1, 3)),
            untrained=name in untrained,
        )
        for name, shape in shapes.items()
    }
    header = {"world_size": world_size, "files": files, "tensors": infos, **header}
    manifest_of(step, header).save(folder / "manifest.json")
    return folder


def manifest_of(step: int, header: dict[str, Any]) -> Manifest:
    """A manifest with the values of `header`, at either level, and plausible others."""
    train = {
        "step": step,
        "data_step": step,
        "samples_seen": step * 8,
        "bad_samples": 0,
        "steps_per_epoch": 10,
        "data_fingerprint": "f00",
        "decoder": "pillow",
        "precision": "fp32",
        "config": CONFIG,
        "versions": {"vitscale": "0.1.0"},
        "teacher": "",
    }
    values = {
        "optimizer": "adamw",
        "slots": STATES,
        "zero_stage": 1,
        "loss_scaler": {},
        "counters": Counters(global_steps=step),
        "created": "2026-01-02T03:04:05+00:00",
    }
    for key, value in header.items():
        (train if key in train else values)[key] = value
    return Manifest(train=TrainState(**train), **values)


def verified(folder: Path) -> Manifest:
    """The manifest of a step directory that passes. Raises CheckpointError if it does not."""
    return open_directory(str(folder)).manifest


def steps_on_disk(place: str | Path) -> list[int]:
    """The steps of all committed checkpoints in a folder or store, sorted by number."""
    return sorted(step for step, _ in store.committed_in([str(place)]))


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint below a folder that passes, as a run finds it."""
    home = Home(directory)
    return newest_good(lambda failed: first_untried(home.committed(), failed), str(directory), alone)


def _cuts(num_values: int, world_size: int, seed: int) -> list[tuple[int, int]]:
    """(start, count) of every rank's piece."""
    rng = random.Random(f"{seed} {num_values}")
    inner = sorted(rng.randint(0, num_values) for _ in range(world_size - 1))
    return [(start, end - start) for start, end in itertools.pairwise([0, *inner, num_values])]


def damage(path: Path) -> None:
    """Flip a bit of the last byte of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a manifest and give it the checksum that is right for them."""
    values = json.loads(path.read_text())
    values.pop("checksum")
    edit(values)
    text = json.dumps(values, sort_keys=True).encode()
    path.write_text(json.dumps({**values, "checksum": xxhash.xxh3_128(text).hexdigest()}))


def write_partly_broken(folder: Path) -> Path:
    """The index of a shard of 64 samples, every fourth of which is no image."""
    members = []
    for sample in range(64):
        image = b"a text file" if sample % 4 == 0 else jpeg(sample)
        members += [(f"s{sample:03d}.jpg", image), (f"s{sample:03d}.cls", str(sample % 5).encode())]
    index = build_index([str(write_tar(folder / "x.tar", members))], chunk_samples=4)
    index.save(folder / "index.json")
    return folder / "index.json"
