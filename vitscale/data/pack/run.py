"""Packing: list the source, plan the shards, write each as a job of its own.

The same source and options give the same bytes, whatever the number of workers and however often it was
killed on the way. To write a shard anew, remove it and run again.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vitscale import processes, rng, storage
from vitscale.config import ConfigError
from vitscale.data.pack import cifar, imagefolder, imagenet, plan, shards, tables
from vitscale.data.pack.config import (
    LISTED,
    SPLITS,
    LeftOut,
    LeftOutTally,
    PackConfig,
    PackReport,
    Unreadable,
)
from vitscale.data.pack.encode import make_sample
from vitscale.data.pack.listing import Listing, Reference
from vitscale.data.pack.writer import open_shard

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

# Each lists a source: (SOURCE, config) -> Listing.
FORMATS: Mapping[str, Callable[[str, PackConfig], Listing]] = {
    "imagefolder": imagefolder.list_imagefolder,
    "imagenet21k": imagenet.list_imagenet21k,
    "imagenet1k": imagenet.list_imagenet1k,
    "cifar10": cifar.list_cifar10,
    "cifar100": cifar.list_cifar100,
    "csv": tables.list_csv,
    "jsonl": tables.list_jsonl,
    "shards": shards.list_shards,
}
_GONE = 20  # so many files of one shard unreadable, and no other, mean that the source is gone


@dataclasses.dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write: all that a worker needs."""

    path: Path
    split: str
    first: int
    references: list[Reference]
    short_side: int
    quality: int


def pack(source: str, out: Path, config: PackConfig, progress: Progress | None = None) -> PackReport:
    """Write SOURCE to shards in OUT, or what is missing of them.

    source: a path, or for "shards" a pattern. progress(done, total) is called with numbers of samples:
    first
    with those that were there already, then after each shard. Raises ConfigError if the source cannot be
    packed, OUT belongs to another packing, or a shard cannot be written.
    """
    _refuse_overlap(source, out, config)
    if not config.overwrite:
        plan.refuse_other_options(out, config)
    listing = FORMATS[config.format](source, config)
    made = plan.make_plan(listing, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with plan.locked(out):
            finished = plan.enter(out, made, config.overwrite)
            _write_classes(out, listing)
            _write_shards(out, made, listing, config, finished, progress or _silent)
            return _report(out, made, listing, len(finished))
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); mend that and run the "
            "same command again: finished shards are kept"
        ) from None


def write_job(job: ShardJob) -> int:
    """Write one shard and what was left out of it; returns how many references it took.

    Raises OSError if it cannot be written, ConfigError if no file of many can be read.
    """
    left_out: list[LeftOut] = []
    with open_shard(job.path) as write:
        for number, reference in enumerate(job.references):
            try:
                write(make_sample(reference, job.split, job.first + number, job.short_side, job.quality))
            except LeftOut as reason:
                left_out.append(reason)
        if len(left_out) == len(job.references) >= _GONE and all(isinstance(r, Unreadable) for r in left_out):
            raise ConfigError(
                f"none of the {len(left_out):,} files of {job.path.name} can be read, the first: "
                f"{left_out[0]}; is the source still there? Run the same command again then: finished "
                "shards "
                "are kept"
            )
        plan.write_left_out(job.path, [str(reason) for reason in left_out])
    return len(job.references)


def _write_shards(
    out: Path, made: plan.Plan, listing: Listing, config: PackConfig, finished: set[str], progress: Progress
) -> None:
    total = sum(made.num_samples.values())
    done = sum(shard.count for shard in made.shards() if shard.name in finished)
    if finished:
        logger.info("%d shards are finished already; the others follow", len(finished))
    progress(done, total)
    for count in processes.map_in_order(
        write_job, _jobs(out, made, listing, config, finished), config.workers
    ):
        done += count
        progress(done, total)


def _jobs(
    out: Path, made: plan.Plan, listing: Listing, config: PackConfig, finished: set[str]
) -> Iterator[ShardJob]:
    """The missing shards, made as they are asked for: all references at once would fill the memory."""
    split, order = "", np.arange(0)
    for shard in made.shards():
        if shard.split != split:
            split, order = shard.split, _order(shard.split, made.num_samples[shard.split], config)
        if shard.name not in finished:
            positions = order[shard.first : shard.first + shard.count]
            references = listing.splits[split].take(positions)
            yield ShardJob(
                out / shard.name, split, shard.first, references, config.short_side, config.quality
            )


def _order(split: str, count: int, config: PackConfig) -> np.ndarray:
    if not config.shuffle:
        return np.arange(count)
    return rng.permutation(count, config.seed, "pack", SPLITS.index(split))


def _report(out: Path, made: plan.Plan, listing: Listing, num_kept: int) -> PackReport:
    """Count what is there; raise ConfigError for a split of which nothing could be packed."""
    paths: dict[str, list[str]] = {split: [] for split in made.num_samples}
    num_samples = dict(made.num_samples)
    tally = LeftOutTally(listing.left_out.count, list(listing.left_out.first))
    for shard in made.shards():
        sentences = plan.read_left_out(out, shard.name)
        if len(sentences) < shard.count:  # else it is an empty archive, kept for the next run to see
            paths[shard.split].append(str(out / shard.name))
        for sentence in sentences:
            num_samples[shard.split] -= 1
            tally.add(sentence)
    for split, count in num_samples.items():
        if not count:
            raise ConfigError(
                f"none of the {made.num_samples[split]:,} images of {split} could be packed, the first: "
                f"{tally.first[0]}; mend the source and run again with --overwrite"
            )
    report = PackReport(
        shards=paths,
        num_samples=num_samples,
        num_kept_shards=num_kept,
        num_left_out=tally.count,
        left_out=tuple(tally.first[:LISTED]),
    )
    values = {"num_samples": num_samples, "num_left_out": tally.count, "left_out": report.left_out}
    values["num_shards"] = {split: len(names) for split, names in paths.items()}
    storage.write_atomic(out / plan.REPORT, json.dumps(values, indent=1).encode())
    return report


def _write_classes(out: Path, listing: Listing) -> None:
    """classes.json, the name of each class index; for WordNet ids also synsets.json, the index of each."""
    if listing.classes:
        names = json.dumps(list(listing.classes), indent=1, ensure_ascii=False) + "\n"
        storage.write_atomic(out / "classes.json", names.encode(errors="surrogateescape"))
    if listing.synsets:
        indices = {name: index for index, name in enumerate(listing.classes)}
        storage.write_atomic(out / "synsets.json", (json.dumps(indices, indent=1) + "\n").encode())


def _refuse_overlap(source: str, out: Path, config: PackConfig) -> None:
    """Shards within the source would be taken for a part of it, and replaced ones would be lost."""
    target = os.path.realpath(out)
    if config.format == "shards":
        paths = [storage.local_path(url) for url in storage.expand(source)]
        # A shard may be a link: where it stands and where it leads to.
        folders = {os.path.dirname(path) or "." for path in [*paths, *map(os.path.realpath, paths)]}
        within = target in map(os.path.realpath, folders)
    else:
        within = os.path.isdir(source) and (target + os.sep).startswith(os.path.realpath(source) + os.sep)
    if within:
        raise ConfigError(f"{out} is where the source {source} lies; choose a folder outside of it")


def _silent(done: int, total: int) -> None:
    """Nobody watches."""
