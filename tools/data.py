#!/usr/bin/env python3
"""Make, index, check, describe and deduplicate training data in WebDataset shards."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale.redaction import redact

SUSPICIOUS_SHARE = 0.03  # of the training images that dedup finds


def main(argv: Sequence[str] | None = None) -> int:
    from vitscale.curate.options import parse

    arguments = parse(argv, __doc__ or "")
    # What needs torch is imported after the arguments have been checked: --help is instant.
    from vitscale import command

    return command.run(lambda: COMMANDS[arguments.command](arguments))


def demo(arguments: argparse.Namespace) -> int:
    from vitscale.curate.pack.demo import make_demo

    for name, count in make_demo(arguments.out).items():
        print(f"{arguments.out / name!s:<44} {count:>7,} samples")
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from vitscale.curate.pack import run
    from vitscale.curate.pack.config import PackConfig
    from vitscale.data.indexing import build_index, journal_of

    names = [field.name for field in dataclasses.fields(PackConfig) if field.name != "shuffle"]
    config = PackConfig(
        shuffle=not arguments.no_shuffle, **{name: getattr(arguments, name) for name in names}
    )
    with Bar("image") as bar:
        report = run.pack(arguments.source, arguments.out, config, bar.update)
    if report.edition:
        print(report.edition)
    for split, shards in report.shards.items():
        out = arguments.out / ("index.json" if split == "train" else f"{split}.index.json")
        with journal_of(out) as journal, Bar("shard") as bar:
            index = build_index(shards, workers=config.workers, journal=journal, progress=bar.update)
            index.save(out)
        num_classes = len(index.label_counts)
        print(f"{out}: {index.num_samples:,} samples in {len(shards)} shards, {num_classes:,} classes")
        if split == "train":
            report_classes(index)
        report_index(index, out)
    report_passed_over(report.passed_over)
    for sentence in report.omissions:
        print(redact(f"left out: {sentence}"), file=sys.stderr)
    if report.num_omissions:
        print(f"{report.num_omissions:,} left out; see {arguments.out / 'pack-report.json'}", file=sys.stderr)
    return 0


def index_shards(arguments: argparse.Namespace) -> int:
    from vitscale.data.classes import read_classes
    from vitscale.data.index import check_names, check_replaceable
    from vitscale.data.indexing import build_index, journal_of
    from vitscale.data.samples import SampleKeys
    from vitscale.errors import ConfigError
    from vitscale.stores import storage
    from vitscale.system import atomic

    keys = SampleKeys(
        image_key=arguments.image_key,
        label_key=arguments.label_key,
        classes=read_classes(arguments.classes) if arguments.classes else {},
    )
    shards = storage.expand(arguments.shards)
    if not arguments.out and not storage.is_local(shards[0]):
        raise ConfigError(
            f"{shards[0]} is not on a local disk, where index.json could be written beside it; "
            "name a local file with --out"
        )
    out = arguments.out or Path(storage.local_path(shards[0])).parent / "index.json"
    atomic.check_writable(out, ".json")
    check_replaceable(out)
    check_names(shards, out)
    with journal_of(out) as journal, Bar("shard") as bar:
        index = build_index(
            shards,
            chunk_samples=arguments.chunk_samples,
            allow_damaged=arguments.allow_damaged,
            keys=keys,
            workers=arguments.workers,
            journal=journal,
            progress=bar.update,
        )
        index.save(out)
    print(out)
    if any(url != storage.without_query(url) for url in shards):
        print(
            "the index holds the URLs without their queries, which may be secrets; to read the shards, "
            f"name a file of the full URLs, one per line, with {storage.URLS_VARIABLE}",
            file=sys.stderr,
        )
    print(f"{index.num_samples:,} samples in {len(shards)} shards, {index.num_damaged:,} of them damaged")
    report_index(index, out)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.curate.verify import verify_index
    from vitscale.data.index import Index

    index, num_damaged = Index.load(arguments.index), 0
    with Bar("shard") as bar:
        for sentence in verify_index(
            index, decode_images=arguments.decode, workers=arguments.workers, progress=bar.update
        ):
            num_damaged += 1
            print(redact(sentence))
    report_doubts(index, arguments.index)
    if num_damaged:
        print(f"error: {num_damaged:,} damaged places in {len(index.shards)} shards", file=sys.stderr)
        return 2
    print(f"{index.num_samples:,} samples in {len(index.shards)} shards verified")
    return 0


def stats(arguments: argparse.Namespace) -> int:
    from vitscale.curate.stats import describe, draw, measure
    from vitscale.data.index import Index
    from vitscale.system import atomic

    if arguments.png:
        atomic.check_writable(arguments.png, ".png")
    measured = measure(Index.load(arguments.index))
    print(describe(measured))
    report_doubts(measured.index, arguments.index)
    if arguments.png:
        draw(measured).save(arguments.png)
        print(f"\nhistograms: {arguments.png}")
    return 0


def dedup(arguments: argparse.Namespace) -> int:
    from vitscale.curate.dedup import THRESHOLD, find_duplicates
    from vitscale.curate.duplicates import contact_sheet
    from vitscale.data.index import Index
    from vitscale.system import atomic

    atomic.check_writable(arguments.out, ".json")
    if arguments.sheet:
        atomic.check_writable(arguments.sheet, ".png")
    index = Index.load(arguments.index)
    with Bar("image") as bar:
        duplicates = find_duplicates(
            index,
            arguments.against,
            threshold=arguments.threshold,
            workers=arguments.workers,
            progress=bar.update,
        )
    duplicates.save(arguments.out)
    num_found, num_exact = len(duplicates.pairs), sum(pair.exact for pair in duplicates.pairs)
    share = num_found / index.num_samples
    print(
        f"{arguments.out}: up to {num_found:,} of {index.num_samples:,} training images ({share:.1%}) "
        f"are copies of test images, {num_exact:,} of them exact"
    )
    for test_set in duplicates.test_sets:
        if arguments.threshold is None and test_set.threshold < THRESHOLD:
            print(
                f"the images of {test_set.name} look alike: copies of them are searched within "
                f"{test_set.threshold} of 128 bits, not {THRESHOLD}, which misses the more edited ones; "
                "--threshold sets it"
            )
    if share > SUSPICIOUS_SHARE:
        print(
            f"warning: {share:.1%} is more than copies usually are: where all images are of one kind, like "
            "digits or clothes, different ones look alike to the hash; look at the pairs with --sheet, and "
            "choose a lower --threshold",
            file=sys.stderr,
        )
    print(f'use it with: data.exclude = "{arguments.out}"')
    if arguments.sheet:
        contact_sheet(duplicates).save(arguments.sheet)
        print(f"the most doubtful pairs: {arguments.sheet}")
    report_damage(duplicates.damage, duplicates.unreadable)
    return 0


def warm(arguments: argparse.Namespace) -> int:
    from vitscale import config as configs
    from vitscale.curate.warm import warm_cache
    from vitscale.data.sources import open_sources
    from vitscale.errors import ConfigError
    from vitscale.train_config import TrainConfig

    config = configs.load(TrainConfig, *configs.divided(arguments.configs))
    engine = config.engine
    if not engine.cache_dir:
        raise ConfigError('engine.cache_dir is "", so the run has no cache; set it to a folder on this node')
    with Bar("shard") as bar:
        warmed = warm_cache(
            open_sources(config.data), engine.cache_dir, int(engine.cache_gb * 1e9), bar.update
        )
    share = warmed.num_bytes / warmed.total_bytes
    print(
        f"{engine.cache_dir}: {share:.1%} of the run's remote shards, {warmed.num_bytes:,} of "
        f"{warmed.total_bytes:,} bytes"
    )
    if warmed.num_bytes < warmed.wanted_bytes:
        print(
            f"{warmed.wanted_bytes - warmed.num_bytes:,} bytes that should be there are not: they are "
            f"damaged, the disk is full, or engine.cache_gb = {engine.cache_gb:g} is too little room",
            file=sys.stderr,
        )
    elif share < 1:
        print(f"engine.cache_gb = {engine.cache_gb:g} holds no more", file=sys.stderr)
    if warmed.num_bad:
        print(f"{warmed.num_bad:,} samples cannot be used; training replaces them", file=sys.stderr)
    return 0


def report_index(index: Any, path: Path) -> None:
    """Print what is noteworthy in a new index. Training replaces the damaged samples."""
    from vitscale.data.scan import commonest

    for sentence in commonest(index.reasons, len(index.reasons)):
        print(redact(f"damaged: {sentence}"), file=sys.stderr)
    report_doubts(index, path)
    report_passed_over(index.passed_over)


def report_passed_over(counts: Mapping[str, int]) -> None:
    """Print how many files of shards are neither images nor labels, by extension."""
    if counts:
        texts = [f"{count:,} {extension}" for extension, count in sorted(counts.items())]
        print(redact(f"passed over, neither images nor labels: {', '.join(texts)}"), file=sys.stderr)


def report_classes(index: Any) -> None:
    """Print the number of classes to train with, and which of classes.json have no image."""
    from vitscale.data.classes import names_beside, names_by_label

    num_classes = len(names_by_label(names_beside(index.shards[0].url)))
    print(f"to train on them: model.num_classes = {max(num_classes, max(index.usual_labels) + 1)}")
    empty = [index.named(label) for label in range(num_classes) if label not in index.label_counts]
    if empty:
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        print(redact(f"check: no image of class {', '.join(empty[:5])}{more}"), file=sys.stderr)


def report_doubts(index: Any, path: str | Path) -> None:
    """Print what looks wrong in an index."""
    from vitscale.curate.stats import doubts

    for sentence in doubts(index, path):
        print(redact(f"check: {sentence}"), file=sys.stderr)


def report_damage(sentences: Sequence[str], total: int) -> None:
    """Print the first damaged samples. They stay in the index; training replaces them."""
    for sentence in sentences:
        print(redact(f"damaged: {sentence}"), file=sys.stderr)
    if total > len(sentences):
        print(f"damaged: and {total - len(sentences):,} more", file=sys.stderr)


class Bar:
    """A progress bar, if stderr is a terminal; `update` is a ProgressCallback."""

    def __init__(self, unit: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)


COMMANDS = {
    "demo": demo,
    "pack": pack,
    "index": index_shards,
    "verify": verify,
    "stats": stats,
    "dedup": dedup,
    "warm": warm,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
