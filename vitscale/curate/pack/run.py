"""Packing: list the source, plan the shards, write each as a task of its own.

The same source and options give the same bytes, whatever the number of workers, and however
often the packing was killed. To write one shard again, remove it and run the same command. If
everything was left out of it, it has no file: remove its record in pack-left-out/ instead.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vitscale import rng
from vitscale.curate.pack import cifar, imagefolder, imagenet, shards, tables
from vitscale.curate.pack.config import (
    NUM_LISTED,
    SHARD_SPLITS,
    Omission,
    Omissions,
    PackConfig,
    PackReport,
    UnreadableFile,
)
from vitscale.curate.pack.encode import make_sample
from vitscale.curate.pack.listing import Listing, Reference
from vitscale.curate.pack.plan import (
    REPORT_FILE,
    PackPlan,
    locked,
    make_plan,
    prepare,
    read_omissions,
    refuse_other_options,
    write_omissions,
)
from vitscale.curate.pack.transfer import imagenet as imagenet_tests
from vitscale.curate.pack.transfer import objectnet, oxford
from vitscale.curate.pack.vtab.formats import VTAB_FORMATS
from vitscale.curate.pack.writer import open_shard
from vitscale.errors import ConfigError, DataError, StoreError
from vitscale.system import atomic, processes
from vitscale.system.processes import ProgressCallback, no_progress

logger = logging.getLogger(__name__)

# Each function lists a source: (SOURCE, config) -> Listing.
FORMATS: Mapping[str, Callable[[str, PackConfig], Listing]] = {
    "imagefolder": imagefolder.list_imagefolder,
    "imagenet21k": imagenet.list_imagenet21k,
    "imagenet1k": imagenet.list_imagenet1k,
    "cifar10": cifar.list_cifar10,
    "cifar100": cifar.list_cifar100,
    "pets": oxford.list_pets,
    "flowers102": oxford.list_flowers102,
    "imagenet_real": imagenet_tests.list_imagenet_real,
    "imagenet_v2": imagenet_tests.list_imagenet_v2,
    "objectnet": objectnet.list_objectnet,
    "csv": tables.list_csv,
    "jsonl": tables.list_jsonl,
    "shards": shards.list_shards,
    **VTAB_FORMATS,
}
_NUM_GONE = 20  # if a shard has so many files and none can be read, the source is gone


@dataclasses.dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write: all that a worker needs."""

    path: Path
    split: str
    first: int
    references: list[Reference]
    short_side: int
    quality: int


class _NoSample(Exception):
    """A shard would hold no sample, so it is not written."""


def pack(source: str, out: Path, config: PackConfig, progress: ProgressCallback = no_progress) -> PackReport:
    """Write the images of a source to shards in `out`, or those shards that are missing.

    source: a path; for the format "shards", an index.json or a pattern.
    progress: called with numbers of samples; finished shards of an earlier run count as done.

    Raises DataError for a source that cannot be packed, ConfigError if `out` belongs to another
    packing, BusyError if another process packs into it, StoreError if it cannot be written.
    """
    _refuse_overlap(source, out, config)
    if not config.overwrite:
        refuse_other_options(out, config)
    listing = FORMATS[config.format](source, config)
    plan = make_plan(listing, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            finished = prepare(out, plan, config.overwrite)
            _write_classes(out, listing)
            _write_shards(out, plan, listing, config, finished, progress)
            return _report(out, plan, listing, len(finished))
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); "
            "fix that and run the same command again: finished shards are kept"
        ) from None


def write_shard(task: ShardTask) -> int:
    """Write one shard and record its omissions; return the number of its references.

    One that would hold no sample, which an index refuses, is not written. Raises OSError if it
    cannot be written, DataError if none of its many files can be read.
    """
    omissions: list[Omission] = []
    with contextlib.suppress(_NoSample), open_shard(task.path) as write:
        for position, reference in enumerate(task.references, task.first):
            try:
                write(make_sample(reference, task.split, position, task.short_side, task.quality))
            except Omission as omission:
                omissions.append(omission)
        if len(omissions) == len(task.references) >= _NUM_GONE:
            _refuse_missing_source(task, omissions)
        write_omissions(task.path, [str(omission) for omission in omissions])
        if len(omissions) == len(task.references):
            raise _NoSample
    return len(task.references)


def _refuse_missing_source(task: ShardTask, omissions: list[Omission]) -> None:
    if all(isinstance(omission, UnreadableFile) for omission in omissions):
        raise DataError(
            f"none of the {len(omissions):,} files of {task.path.name} can be read, the first: "
            f"{omissions[0]}; is the source still there? Restore it and run the same command again: "
            "finished shards are kept"
        )


def _write_shards(
    out: Path,
    plan: PackPlan,
    listing: Listing,
    config: PackConfig,
    finished: set[str],
    progress: ProgressCallback,
) -> None:
    total = sum(plan.num_samples.values())
    num_done = sum(shard.count for shard in plan.shards() if shard.name in finished)
    if finished:
        num_shards = len(list(plan.shards()))
        rest = "writing the others" if len(finished) < num_shards else "nothing is left to write"
        logger.info("shards finished already: %d of %d; %s", len(finished), num_shards, rest)
    progress(num_done, total)
    tasks = _tasks(out, plan, listing, config, finished)
    for count in processes.map_in_order(write_shard, tasks, config.workers):
        num_done += count
        progress(num_done, total)


def _tasks(
    out: Path, plan: PackPlan, listing: Listing, config: PackConfig, finished: set[str]
) -> Iterator[ShardTask]:
    """The missing shards, one by one: all references at once would fill the memory."""
    split, order = "", np.arange(0)
    for shard in plan.shards():
        if shard.split != split:
            split, order = shard.split, _order(shard.split, plan.num_samples[shard.split], config)
        if shard.name not in finished:
            positions = order[shard.first : shard.first + shard.count]
            references = listing.splits[split].take(positions)
            path = out / shard.name
            yield ShardTask(path, split, shard.first, references, config.short_side, config.quality)


def _order(split: str, count: int, config: PackConfig) -> np.ndarray:
    if not config.shuffle:
        return np.arange(count)
    return rng.permutation(count, config.seed, "pack", SHARD_SPLITS.index(split))


def _report(out: Path, plan: PackPlan, listing: Listing, num_kept: int) -> PackReport:
    """Count what was packed, and write it to OUT. Raises DataError for an empty split."""
    paths: dict[str, list[str]] = {split: [] for split in plan.num_samples}
    num_samples = dict(plan.num_samples)
    omissions = Omissions(listing.omissions.count, list(listing.omissions.first))
    for shard in plan.shards():
        sentences = read_omissions(out, shard.name)
        if len(sentences) < shard.count:  # or there is none; earlier commits left an empty archive
            paths[shard.split].append(str(out / shard.name))
        for sentence in sentences:
            num_samples[shard.split] -= 1
            omissions.add(sentence)
    for split, count in num_samples.items():
        if not count:
            raise DataError(
                f"none of the {plan.num_samples[split]:,} images of {split} could be packed, the first: "
                f"{omissions.first[0]}; fix the source and run again with --overwrite"
            )
    report = PackReport(
        shards=paths,
        num_samples=num_samples,
        num_kept_shards=num_kept,
        num_omissions=omissions.count,
        omissions=tuple(omissions.first[:NUM_LISTED]),
        edition=listing.edition,
        passed_over=listing.passed_over,
    )
    values = {
        **({"edition": report.edition} if report.edition else {}),
        "num_samples": num_samples,
        "num_left_out": report.num_omissions,
        "left_out": report.omissions,
        **({"passed_over": report.passed_over} if report.passed_over else {}),
        "num_shards": {split: len(split_paths) for split, split_paths in paths.items()},
    }
    atomic.write(out / REPORT_FILE, json.dumps(values, indent=1).encode())
    return report


def _write_classes(out: Path, listing: Listing) -> None:
    """Write classes.json, the class names by index; for WordNet ids also synsets.json.

    synsets.json maps the other way, from each WordNet id to its class index.
    """
    if listing.classes:
        names = json.dumps(list(listing.classes), indent=1, ensure_ascii=False) + "\n"
        atomic.write(out / "classes.json", names.encode(errors="surrogateescape"))
    if listing.synsets:
        indices = {name: index for index, name in enumerate(listing.classes)}
        atomic.write(out / "synsets.json", (json.dumps(indices, indent=1) + "\n").encode())


def _refuse_overlap(source: str, out: Path, config: PackConfig) -> None:
    """Refuse an `out` in the source: its shards would join the source, or replace it."""
    target = os.path.realpath(out)
    if config.format == "shards":
        paths, _ = shards.open_shards(source)
        # A shard may be a link: both the folder of the link and that of its target count.
        folders = {os.path.dirname(path) or "." for path in [*paths, *map(os.path.realpath, paths)]}
        within = target in map(os.path.realpath, folders)
    else:
        within = os.path.isdir(source) and (target + os.sep).startswith(os.path.realpath(source) + os.sep)
    if within:
        raise ConfigError(f"{out} is inside the source {source}; choose a folder outside of it")
