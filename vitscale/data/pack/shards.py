"""Existing WebDataset shards as a source: to shuffle, cut or encode them anew."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from vitscale import processes, storage
from vitscale.config import ConfigError
from vitscale.data.pack.config import SPLITS, LeftOutTally, PackConfig
from vitscale.data.pack.listing import MAX_LABEL, FileReferences, Listing
from vitscale.data.pack.tar_members import TarPlace, list_members
from vitscale.data.samples import (
    IGNORED_EXTENSIONS,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    parse_labels,
    split_name,
)

File = tuple[str, int, int]  # extension, offset, bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSamples:
    """The samples of a shard as (key, offset and bytes of the image, labels), and what was left out."""

    samples: list[tuple[str, int, int, tuple[int, ...]]]
    left_out: list[str]


def list_shards(source: str, config: PackConfig) -> Listing:
    """The local shards that a glob or brace pattern names; train-*.tar, val-*.tar and test-*.tar stay
    splits
    of their own, all other names are "train".

    The class names come from the classes.json beside the first shard, where there is one.
    """
    paths = [storage.local_path(url) for url in storage.expand(source) if storage.is_local(url)]
    if not paths:
        raise ConfigError(f"{source} is not on a local disk; copy the shards, or mount their store")
    left_out = LeftOutTally()
    splits: dict[str, FileReferences] = {}
    for path, shard in zip(paths, processes.map_in_order(list_shard, paths, config.workers), strict=True):
        prefix = os.path.basename(path).partition("-")[0]
        split = prefix if prefix in SPLITS else SPLITS[0]
        references = splits.setdefault(split, FileReferences(""))
        archive = references.add_archive(path)
        for sentence in shard.left_out:
            left_out.add(f"{path}: {sentence}")
        for key, offset, size, labels in shard.samples:
            references.add(key, labels, size, archive, offset)
    ordered = {split: splits[split] for split in SPLITS if split in splits and len(splits[split])}
    if not ordered:
        raise ConfigError(f"{source} holds no usable sample; the first: {left_out.first or 'nothing at all'}")
    return Listing(splits=dict(ordered), classes=_class_names(Path(paths[0])), left_out=left_out)


def list_shard(path: str) -> ShardSamples:
    """The samples of one shard, from its headers and label files."""
    members = list_members(TarPlace(path, 0, path))
    listed = ShardSamples([], [members.damage] if members.damage else [])
    named = [(*split_name(name), offset, size) for name, offset, size in members.files]
    for key, group in itertools.groupby(named, key=lambda file: file[0]):
        files = [file[1:] for file in group]
        images = [file for file in files if file[0] in IMAGE_EXTENSIONS]
        labels = [file for file in files if file[0] in LABEL_EXTENSIONS]
        listed.left_out.extend(_unknown(key, files))
        if len(images) != 1 or len(labels) != 1:
            listed.left_out.append(f"sample {key} has {len(images)} images and {len(labels)} label files")
            continue
        try:
            parsed = _read_labels(path, labels[0])
        except (OSError, ValueError) as error:
            listed.left_out.append(f"sample {key}: its .{labels[0][0]} cannot be read as labels ({error})")
            continue
        listed.samples.append((key, *images[0][1:], parsed))
    return listed


def _unknown(key: str, files: list[File]) -> Iterator[str]:
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
        raise ConfigError(f"{path} cannot be read as JSON ({error}); mend or remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path} must be a list of class names; mend or remove it")
    return tuple(names)
