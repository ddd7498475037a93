#!/usr/bin/env python3
"""Make, index, check, describe and deduplicate training data in WebDataset shards."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLE = """examples:
  python tools/data.py demo data/demo
  python tools/data.py pack photos/ data/photos
  python tools/data.py pack fall11_whole/ data/in21k --format imagenet21k --short-side 256 --workers 16
  python tools/data.py pack cifar-10-python.tar.gz data/cifar10 --format cifar10
  python tools/data.py index "s3://bucket/in21k/train-{000000..001419}.tar" --out data/in21k.json
  python tools/data.py verify data/in21k/index.json
  python tools/data.py stats data/in21k/index.json --png stats.png
  python tools/data.py dedup data/in21k/index.json --against "data/cifar10/test-*.tar" --out copies.json"""
FORMATS = ("imagefolder", "imagenet21k", "imagenet1k", "cifar10", "cifar100", "csv", "jsonl", "shards")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)

    from vitscale.config import ConfigError
    from vitscale.data.index import DataError

    try:
        return COMMANDS[arguments.command](arguments)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command again goes on where it can", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, head or less, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or error}: {error.strerror}; mend the path or its permissions",
            file=sys.stderr,
        )
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_subparsers(dest="command", required=True).add_parser
    cores = os.cpu_count() or 1

    demo = add(
        "demo", help="drawn shapes and real digits, without a network", epilog=_example("demo data/demo")
    )
    demo.add_argument("out", type=_local, metavar="OUT")
    _add_pack(add, cores)

    index = add(
        "index",
        help="index.json for shards; again after a kill, it goes on",
        epilog=_example('index "data/photos/train-*.tar"'),
    )
    index.add_argument("shards", metavar="SHARDS", help="glob, brace pattern or URL, quoted")
    index.add_argument("--out", type=_local, help="default: index.json in the shards' folder")
    index.add_argument("--chunk-samples", type=int, default=32)
    index.add_argument(
        "--allow-damaged", action="store_true", help="index what lies before the damage in a broken shard"
    )
    index.add_argument("--workers", type=int, default=cores, help="processes; 0 for none")

    verify = add("verify", help="re-read every shard", epilog=_example("verify data/photos/index.json"))
    verify.add_argument("index", metavar="INDEX")
    verify.add_argument("--decode", action="store_true", help="also decode every image")
    verify.add_argument("--workers", type=int, default=cores, help="processes; 0 for none")

    stats = add(
        "stats",
        help="counts, sizes, labels, resolutions",
        epilog=_example("stats data/photos/index.json --png stats.png"),
    )
    stats.add_argument("index", metavar="INDEX")
    stats.add_argument("--png", type=_local, metavar="OUT", help="also draw the histograms")
    _add_dedup(add, cores)
    return parser.parse_args(argv)


def _add_pack(add: Any, cores: int) -> None:
    pack = add(
        "pack",
        help="images to shards; again after a kill, it goes on",
        epilog=_example("pack photos/ data/photos --short-side 256"),
    )
    pack.add_argument("source", metavar="SOURCE", help="folder, archive, table, or quoted pattern of shards")
    pack.add_argument("out", type=_local, metavar="OUT")
    pack.add_argument("--format", choices=FORMATS, default="imagefolder")
    pack.add_argument("--samples-per-shard", type=int, default=1000)
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle")
    pack.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    pack.add_argument(
        "--short-side", type=int, default=0, help="re-encode images whose short side is larger; 0 = keep all"
    )
    pack.add_argument("--quality", type=int, default=90, help="of the JPEGs that are re-encoded")
    pack.add_argument("--labels", choices=["fine", "coarse"], default="fine", help="of CIFAR-100")
    pack.add_argument(
        "--val-images", default="", help="ImageNet-1k: ILSVRC2012_img_val.tar or the folder of its JPEGs"
    )
    pack.add_argument(
        "--val-labels",
        default="",
        help="ImageNet-1k: text file, one synset a line in the order of the file names",
    )
    pack.add_argument("--workers", type=int, default=cores, help="processes; 0 for none")
    pack.add_argument("--overwrite", action="store_true", help="start anew: replace the shards in OUT")


def _add_dedup(add: Any, cores: int) -> None:
    dedup = add(
        "dedup",
        help="training images that are copies of test images",
        epilog=_example(
            'dedup data/in21k/index.json --against "data/cifar10/test-*.tar" --out '
            "data/in21k/duplicates.json "
            "--sheet duplicates.png"
        ),
    )
    dedup.add_argument("index", metavar="INDEX")
    dedup.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="TEST",
        help="index.json, glob, brace pattern or URL of a test set, quoted",
    )
    dedup.add_argument(
        "--out", type=_local, required=True, metavar="FILE", help="for data.exclude of a config"
    )
    dedup.add_argument(
        "--threshold",
        type=int,
        default=24,
        help="bits of 128 in which the hashes of copies may differ, 0 to 32",
    )
    dedup.add_argument("--workers", type=int, default=cores, help="processes; 0 for none")
    dedup.add_argument("--sheet", type=_local, metavar="PNG", help="the 24 most doubtful pairs side by side")


def demo(arguments: argparse.Namespace) -> int:
    from vitscale.data.pack.demo import make_demo

    for name, count in make_demo(arguments.out).items():
        print(f"{arguments.out / name!s:<44} {count:>7,} samples")
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import build_index
    from vitscale.data.pack import run
    from vitscale.data.pack.config import PackConfig

    names = [field.name for field in dataclasses.fields(PackConfig) if field.name != "shuffle"]
    config = PackConfig(
        shuffle=not arguments.no_shuffle, **{name: getattr(arguments, name) for name in names}
    )
    with Bar("image") as bar:
        report = run.pack(arguments.source, arguments.out, config, bar.set)
    for split, shards in report.shards.items():
        out = arguments.out / ("index.json" if split == "train" else f"{split}.index.json")
        with Bar("shard", len(shards)) as bar:
            index = build_index(
                shards, workers=config.workers, journal=out.with_suffix(".partial"), progress=bar.add
            )
        index.save(out)
        print(f"{out}: {index.num_samples:,} samples in {len(shards)} shards")
        report_damage(index.damage, index.num_damaged)
    for sentence in report.left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    if report.num_left_out:
        print(f"{report.num_left_out:,} left out; see {arguments.out / 'pack-report.json'}", file=sys.stderr)
    return 0


def index_shards(arguments: argparse.Namespace) -> int:
    from vitscale import storage
    from vitscale.config import ConfigError
    from vitscale.data.index import build_index

    shards = storage.expand(arguments.shards)
    if not arguments.out and not storage.is_local(shards[0]):
        raise ConfigError(
            "--out FILE is needed for shards that are not on a local disk: where shall index.json go?"
        )
    out = arguments.out or Path(storage.local_path(shards[0])).parent / "index.json"
    check_writable(out, ".json")
    with Bar("shard", len(shards)) as bar:
        index = build_index(
            shards,
            chunk_samples=arguments.chunk_samples,
            allow_damaged=arguments.allow_damaged,
            workers=arguments.workers,
            journal=out.with_suffix(".partial"),
            progress=bar.add,
        )
    index.save(out)
    print(out)
    print(f"{index.num_samples:,} samples in {len(shards)} shards, {index.num_damaged:,} of them damaged")
    report_damage(index.damage, index.num_damaged)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import Index
    from vitscale.data.verify import verify_index

    index, places = Index.load(arguments.index), 0
    with Bar("shard", len(index.shards)) as bar:
        for sentence in verify_index(
            index, decode_images=arguments.decode, workers=arguments.workers, progress=bar.add
        ):
            places += 1
            print(sentence)
    if places:
        print(f"error: {places:,} damaged places in {len(index.shards)} shards", file=sys.stderr)
        return 2
    print(f"{index.num_samples:,} samples in {len(index.shards)} shards verified")
    return 0


def stats(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import Index
    from vitscale.data.stats import describe, draw, measure

    if arguments.png:
        check_writable(arguments.png, ".png")
    measured = measure(Index.load(arguments.index))
    print(describe(measured))
    if arguments.png:
        draw(measured).save(arguments.png)
        print(f"\nhistograms: {arguments.png}")
    return 0


def dedup(arguments: argparse.Namespace) -> int:
    from vitscale.data.dedup import find_duplicates
    from vitscale.data.duplicates import contact_sheet
    from vitscale.data.index import Index

    check_writable(arguments.out, ".json")
    if arguments.sheet:
        check_writable(arguments.sheet, ".png")
    index = Index.load(arguments.index)
    with Bar("image") as bar:
        found = find_duplicates(
            index,
            arguments.against,
            threshold=arguments.threshold,
            workers=arguments.workers,
            progress=bar.more,
        )
    found.save(arguments.out)
    exact = sum(pair.exact for pair in found.pairs)
    print(
        f"{arguments.out}: {len(found.pairs):,} of {index.num_samples:,} training images are copies of "
        "test "
        f"images, {exact:,} of them exact"
    )
    print(f'use it with: data.exclude = "{arguments.out}"')
    if arguments.sheet:
        contact_sheet(found).save(arguments.sheet)
        print(f"the most doubtful pairs: {arguments.sheet}")
    report_damage(found.damage, found.unreadable)
    return 0


def report_damage(sentences: Sequence[str], total: int) -> None:
    """Name the first damaged samples: they stay in the index, and training replaces and counts them."""
    for sentence in sentences:
        print(f"damaged: {sentence}", file=sys.stderr)
    if total > len(sentences):
        print(f"damaged: and {total - len(sentences):,} more", file=sys.stderr)


def check_writable(path: Path, ending: str) -> None:
    """Make the folder of an output file, and refuse one that cannot be written, before any long work."""
    from vitscale.config import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
            raise ConfigError(f"{path} cannot be written; name another file")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file") from None
    if path.suffix != ending:  # a shard, say, which would be lost
        raise ConfigError(f"{path} does not end in {ending}; name a file that does")


class Bar:
    """A progress bar on a terminal, told in whichever way the library tells its progress."""

    def __init__(self, unit: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, _: str) -> None:
        """One more is done."""
        self.bar.update()

    def more(self, count: int, total: int) -> None:
        """`count` more of `total` are done."""
        self.bar.total = total
        self.bar.update(count)

    def set(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self.more(done - self.bar.n, total)


def _local(path: str) -> Path:
    if "://" in path:  # Path would make a folder of that name here
        raise argparse.ArgumentTypeError(f"{path} is not a local path; write there, and copy it to the store")
    return Path(path)


def _example(command: str) -> str:
    return f"example: python tools/data.py {command}"


COMMANDS = {
    "demo": demo,
    "pack": pack,
    "index": index_shards,
    "verify": verify,
    "stats": stats,
    "dedup": dedup,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
