#!/usr/bin/env python3
"""Make, index, check and describe training data in WebDataset shards."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLE = """examples:
  python tools/data.py demo data/demo
  python tools/data.py pack photos/ data/photos --format imagefolder
  python tools/data.py pack cifar-10-binary.tar.gz data/cifar10 --format cifar10
  python tools/data.py index "data/in21k/train-{000000..001419}.tar"
  python tools/data.py verify data/in21k/index.json
  python tools/data.py stats data/in21k/index.json"""


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
    example = "example: python tools/data.py "

    demo = add(
        "demo", help="drawn shapes and real digits, without a network", epilog=example + "demo data/demo"
    )
    demo.add_argument("out", type=Path, metavar="OUT")

    pack = add(
        "pack", help="images to shards", epilog=example + "pack photos/ data/photos --format imagefolder"
    )
    pack.add_argument("source", type=Path, metavar="SOURCE")
    pack.add_argument("out", type=Path, metavar="OUT")
    pack.add_argument("--format", choices=["imagefolder", "cifar10"], default="imagefolder")
    pack.add_argument("--samples-per-shard", type=int, default=1000)
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle")
    pack.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    pack.add_argument("--overwrite", action="store_true", help="replace shards that are in OUT")

    index = add("index", help="index.json for shards", epilog=example + 'index "data/photos/train-*.tar"')
    index.add_argument("shards", metavar="SHARDS", help="glob, brace pattern or URL, quoted")
    index.add_argument("--out", type=Path, help="default: index.json in the shards' folder")
    index.add_argument("--chunk-samples", type=int, default=32)
    index.add_argument(
        "--allow-damaged", action="store_true", help="index what lies before the damage in a broken shard"
    )

    verify = add("verify", help="re-read every shard", epilog=example + "verify data/photos/index.json")
    verify.add_argument("index", metavar="INDEX")
    stats = add("stats", help="counts, sizes, labels", epilog=example + "stats data/photos/index.json")
    stats.add_argument("index", metavar="INDEX")
    return parser.parse_args(argv)


def demo(arguments: argparse.Namespace) -> int:
    from vitscale.data.pack.demo import make_demo

    for name, count in make_demo(arguments.out).items():
        print(f"{arguments.out / name!s:<44} {count:>7,} samples")
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import build_index
    from vitscale.data.pack import cifar10, imagefolder
    from vitscale.data.pack.writer import write_shards

    seed = None if arguments.no_shuffle else arguments.seed
    if arguments.format == "cifar10":
        classes = cifar10.CLASSES
        splits = {split: cifar10.read_split(arguments.source, split, seed) for split in cifar10.BATCHES}
    else:
        folders = imagefolder.find_splits(arguments.source)
        classes = imagefolder.class_names(next(iter(folders.values())))
        splits = {
            split: imagefolder.read_folder(path, classes, split, seed) for split, path in folders.items()
        }
    for split, samples in splits.items():
        shards = write_shards(
            progress_bar(samples, split, "image"),
            arguments.out,
            split,
            samples_per_shard=arguments.samples_per_shard,
            overwrite=arguments.overwrite,
        )
        index = build_index(shards)
        name = "index.json" if split == "train" else f"{split}.index.json"
        index.save(arguments.out / name)
        print(f"{arguments.out / name}: {index.num_samples:,} samples in {len(shards)} shards")
        report_damage(index.damage, index.num_damaged)
    imagefolder.write_class_names(arguments.out, classes)
    return 0


def index_shards(arguments: argparse.Namespace) -> int:
    from vitscale import storage
    from vitscale.config import ConfigError, positive
    from vitscale.data.index import build_index

    positive("--", **{"chunk-samples": arguments.chunk_samples})
    shards = storage.expand(arguments.shards)
    if not arguments.out and not storage.is_local(shards[0]):
        raise ConfigError(
            "--out FILE is needed for shards that are not on a local disk: where shall index.json go?"
        )
    out = arguments.out or Path(storage.local_path(shards[0])).parent / "index.json"
    with ShardProgress(len(shards)) as progress:
        index = build_index(
            shards,
            chunk_samples=arguments.chunk_samples,
            allow_damaged=arguments.allow_damaged,
            progress=progress,
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        index.save(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); name another place with --out FILE"
        ) from None
    print(out)
    print(f"{index.num_samples:,} samples in {len(shards)} shards, {index.num_damaged:,} of them damaged")
    report_damage(index.damage, index.num_damaged)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import Index, verify_index

    index = Index.load(arguments.index)
    with ShardProgress(len(index.shards)) as progress:
        damage = verify_index(index, progress)
    if damage:
        print("\n".join(damage))
        print(f"error: {len(damage)} damaged places in {len(index.shards)} shards", file=sys.stderr)
        return 2
    print(f"{index.num_samples:,} samples in {len(index.shards)} shards verified")
    return 0


def stats(arguments: argparse.Namespace) -> int:
    from vitscale.data.index import Index
    from vitscale.data.stats import describe

    print(describe(Index.load(arguments.index)))
    return 0


def report_damage(sentences: Sequence[str], total: int) -> None:
    """Name the first damaged samples: they stay in the index, and training replaces and counts them."""
    for sentence in sentences:
        print(f"damaged: {sentence}", file=sys.stderr)
    if total > len(sentences):
        print(f"damaged: and {total - len(sentences):,} more", file=sys.stderr)


def progress_bar(items: Iterable[Any], name: str, unit: str) -> Iterator[Any]:
    """The items as they are, shown as they pass when stderr is a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, desc=name, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())


class ShardProgress:
    """A progress bar over shards, given to the library as a callback."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="shard", file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> Callable[[str], None]:
        return lambda _: self.bar.update() and None

    def __exit__(self, *_: object) -> None:
        self.bar.close()


COMMANDS = {"demo": demo, "pack": pack, "index": index_shards, "verify": verify, "stats": stats}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
