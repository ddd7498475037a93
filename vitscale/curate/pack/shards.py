"""Lists existing WebDataset shards, to shuffle, cut or encode their samples again."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from vitscale import processes, storage
from vitscale.curate.pack.config import SPLITS, Omissions, PackConfig
from vitscale.curate.pack.listing import MAX_LABEL, FileReferences, Listing
from vitscale.curate.pack.tar_members import TarPlace, list_members
from vitscale.data.samples import (
    IGNORED_EXTENSIONS,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    parse_labels,
    split_name,
)
from vitscale.errors import ConfigError, DataError

File = tuple[str, int, int]  # extension, offset, bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSamples:
    """The samples of a shard: (key, offset and bytes of the image, labels); its omissions."""

    samples: list[tuple[str, int, int, tuple[int, ...]]]
    omissions: list[str]


def list_shards(source: str, config: PackConfig) -> Listing:
    """The local shards that a glob or brace pattern names.

    train-*.tar, val-*.tar and test-*.tar remain splits; all other names belong to "train". The
    class names come from the classes.json beside the first shard, if there is one.
    """
    paths = [storage.local_path(url) for url in storage.expand(source) if storage.is_local(url)]
    if not paths:
        raise ConfigError(f"{source} is not on a local disk; copy the shards, or mount their store")
    omissions = Omissions()
    splits: dict[str, FileReferences] = {}
    for path, shard in zip(paths, processes.map_in_order(list_shard, paths, config.workers), strict=True):
        prefix = os.path.basename(path).partition("-")[0]
        split = prefix if prefix in SPLITS else SPLITS[0]
        references = splits.setdefault(split, FileReferences(""))
        archive = references.add_archive(path)
        for sentence in shard.omissions:
            omissions.add(f"{path}: {sentence}")
        for key, offset, size, labels in shard.samples:
            references.add(key, labels, size, archive, offset)
    ordered = {split: splits[split] for split in SPLITS if split in splits and len(splits[split])}
    if not ordered:
        first = omissions.first[0] if omissions.first else "all shards are empty"
        raise DataError(f"{source} holds no usable sample ({first}); name other shards")
    return Listing(splits=dict(ordered), classes=_class_names(Path(paths[0])), omissions=omissions)


def list_shard(path: str) -> ShardSamples:
    """List one shard by its headers and label files; the images are not read."""
    members = list_members(TarPlace(path, 0, path))
    shard = ShardSamples([], [members.damage] if members.damage else [])
    named = [(*split_name(name), offset, size) for name, offset, size in members.files]
    for key, group in itertools.groupby(named, key=lambda file: file[0]):
        files = [file[1:] for file in group]
        images = [file for file in files if file[0] in IMAGE_EXTENSIONS]
        labels = [file for file in files if file[0] in LABEL_EXTENSIONS]
        shard.omissions.extend(_unknown_files(key, files))
        if len(images) != 1 or len(labels) != 1:
            shard.omissions.append(f"sample {key} has {len(images)} images and {len(labels)} label files")
            continue
        try:
            parsed = _read_labels(path, labels[0])
        except (OSError, ValueError) as error:
            shard.omissions.append(f"sample {key}: its .{labels[0][0]} cannot be read as labels ({error})")
            continue
        shard.samples.append((key, *images[0][1:], parsed))
    return shard


def _unknown_files(key: str, files: list[File]) -> Iterator[str]:
    known = (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS, *IGNORED_EXTENSIONS)
    for extension, _, _ in files:
        if extension not in known:
            yield f"{key}.{extension} is neither an image nor a label"


def _read_labels(path: str, file: File) -> tuple[int, ...]:
    extension, offset, size = file
    labels = parse_labels(extension, storage.read_range(path, offset, offset + size))
    if max(labels) > MAX_LABEL:
        raise ValueError(f"a label above {MAX_LABEL:,}")
    return labels


def _class_names(shard: Path) -> tuple[str, ...]:
    path = shard.with_name("classes.json")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fix or remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} must be a list of class names; fix or remove it")
    return tuple(names)
