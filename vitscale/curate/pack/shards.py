"""Lists existing WebDataset shards, to shuffle, cut or encode their samples again."""

import collections
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

from vitscale.curate.pack.config import SHARD_SPLITS, Omissions, PackConfig
from vitscale.curate.pack.imagenet import SYNSET
from vitscale.curate.pack.listing import FileReferences, Listing
from vitscale.curate.pack.tar_members import TarPlace, list_members
from vitscale.data.classes import names_by_label
from vitscale.data.index import Index
from vitscale.data.samples import (
    DEFAULT_KEYS,
    WITHOUT_KEY,
    BadSample,
    LabelError,
    SampleKeys,
    belongs_to_no_sample,
    choose,
    read_labels,
    split_name,
)
from vitscale.data.scan import add_counts, add_reason
from vitscale.data.tar import compression, decompress_hint
from vitscale.errors import ConfigError, DataError
from vitscale.redaction import redact
from vitscale.stores import storage
from vitscale.system import processes


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSamples:
    """The samples of a shard: (key, offset and bytes of the image, labels); those left out.

    damage: what is wrong with the archive; "" if nothing is. others: as in TarMembers.
    passed_over: by extension, how many files are neither image nor label.
    """

    samples: list[tuple[str, int, int, tuple[int, ...]]]
    bad: list[BadSample]
    damage: str
    others: list[str]
    passed_over: collections.Counter[str]


def open_shards(source: str) -> tuple[list[str], SampleKeys]:
    """The paths of the shards that an index.json, or a glob or brace pattern, names.

    Also what holds images and labels in them, if the index says it. Raises ConfigError for
    shards that are not on a local disk.
    """
    keys = DEFAULT_KEYS
    if storage.without_query(source).endswith(".json"):
        index = Index.load(source)
        urls, keys = [shard.url for shard in index.shards], dataclasses.replace(index.keys, strict=False)
    else:
        urls = storage.expand(source)
    remote = [url for url in urls if not storage.is_local(url)]
    if remote:
        raise ConfigError(
            f"{redact(remote[0])}, one of {len(remote):,} shards of {source} in a store, cannot be packed "
            "from there; copy them to a local disk, or mount the store"
        )
    return [storage.local_path(url) for url in urls], keys


def list_shards(source: str, config: PackConfig) -> Listing:
    """The samples of the shards that an index.json, or a glob or brace pattern, names.

    What holds images and labels is as the index was made, unless the config says something.
    train-*.tar, val-*.tar, test-*.tar and those of VTAB-1k remain splits; all other names are
    of "train". The class names come from the classes.json beside the first shard, if any.
    """
    paths, keys = open_shards(source)
    if config.sample_keys() != DEFAULT_KEYS:
        keys = config.sample_keys()
    omissions, reasons = Omissions(), dict[str, tuple[int, str]]()
    passed_over: dict[str, int] = {}
    splits: dict[str, FileReferences] = {}
    shards = processes.map_in_order(functools.partial(list_shard, keys=keys), paths, config.workers)
    for path, shard in zip(paths, shards, strict=True):
        prefix = os.path.basename(path).partition("-")[0]
        split = prefix if prefix in SHARD_SPLITS else SHARD_SPLITS[0]
        references = splits.setdefault(split, FileReferences(""))
        archive = references.add_archive(path)
        if shard.damage:
            omissions.add(f"{path}: {shard.damage}")
        add_counts(passed_over, shard.passed_over)
        for sentence in shard.others:
            omissions.add(sentence)
        for sample in shard.bad:
            add_reason(reasons, sample.reason, 1, sample.place(path))
        for key, offset, size, labels in shard.samples:
            references.add(key, labels, size, archive, offset)
    for reason, (count, example) in reasons.items():
        omissions.add(f"{reason} ({count:,} times, like {example})", count)
    ordered = {split: splits[split] for split in SHARD_SPLITS if split in splits and len(splits[split])}
    if not ordered:
        why = "; ".join(omissions.first[:3]) or "all shards are empty"
        raise DataError(
            f"{source} holds no usable sample: {why}. Name other shards, or what holds images and labels: "
            "--image-key EXTENSION --label-key EXTENSION_OR_JSON_FIELD, and --classes FILE for class names"
        )
    classes = names_by_label(keys.classes) or _class_names(Path(paths[0]))
    synsets = bool(classes) and all(SYNSET.fullmatch(name) for name in classes)
    return Listing(
        splits=dict(ordered),
        classes=classes,
        omissions=omissions,
        synsets=synsets,
        passed_over=passed_over,
    )


def list_shard(path: str, keys: SampleKeys) -> ShardSamples:
    """List one shard by its headers and label files; the images are not read.

    Raises DataError for a shard that is compressed.
    """
    members = list_members(TarPlace(path, 0, path))
    if members.damage and not members.files and (program := compression(storage.read_range(path, 0, 8))):
        raise DataError(f"shard {path} {decompress_hint(path, program)}")
    shard = ShardSamples([], [], members.damage, members.others, collections.Counter())
    named = [
        (*split_name(name), offset, size)
        for name, offset, size in members.files
        if not belongs_to_no_sample(name)
    ]
    shard.passed_over.update(itertools.repeat(WITHOUT_KEY, len(members.files) - len(named)))
    for key, group in itertools.groupby(named, key=lambda file: file[0]):
        files = [file[1:] for file in group]
        extensions = [extension for extension, _, _ in files]
        choice = choose(extensions, keys)
        if isinstance(choice, str):
            shard.bad.append(BadSample(key, choice, " ".join(f".{extension}" for extension in extensions)))
            continue
        shard.passed_over.update(f".{extension}" for extension in extensions if extension not in choice)
        places = {extension: (offset, size) for extension, offset, size in files}
        offset, size = places[choice.label]
        try:
            labels = read_labels(choice, storage.read_range(path, offset, offset + size), keys)
        except LabelError as error:
            shard.bad.append(BadSample(key, str(error), error.found))
            continue
        except OSError as error:
            shard.bad.append(BadSample(key, f"its .{choice.label} cannot be read", str(error)))
            continue
        shard.samples.append((key, *places[choice.image], labels))
    return shard


def _class_names(shard: Path) -> tuple[str, ...]:
    path = shard.with_name("classes.json")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fix or remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} must be a list of class names; fix or remove it")
    return tuple(names)
