"""The command line of tools/data.py. Nothing here takes long to import."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitscale.curate.formats import FORMAT_NAMES, PLAIN_FORMATS
from vitscale.system.cores import num_cores
from vitscale.vtab.tasks import TASKS

EXAMPLE = """examples:
  python tools/data.py demo data/demo
  python tools/data.py pack photos/ data/photos
  python tools/data.py pack fall11_whole/ data/in21k --format imagenet21k --short-side 256 --workers 16
  python tools/data.py pack cifar-10-binary.tar.gz data/cifar10 --format cifar10
  python tools/data.py pack pets/ data/pets --format pets
  python tools/data.py pack vtab/dtd-r1.0.1.tar.gz data/vtab/dtd --format vtab/dtd
  python tools/data.py index "s3://bucket/in21k/train-{000000..001419}.tar" --out data/in21k.json
  python tools/data.py verify data/in21k/index.json
  python tools/data.py stats data/in21k/index.json --png stats.png
  python tools/data.py dedup data/in21k/index.json --against "data/cifar10/test-*.tar" --out copies.json
  python tools/data.py warm mine.toml"""


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The command and its options; ends the program where they cannot be used."""
    parser = argparse.ArgumentParser(
        description=description, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_subparsers(dest="command", required=True).add_parser
    cores = num_cores()

    demo = add(
        "demo",
        help="write a demo data set of drawn shapes and real digits, without a network",
        epilog=_example("demo data/demo"),
    )
    demo.add_argument("out", type=_local_path, metavar="OUT")
    _add_pack(add, cores)

    index = add(
        "index",
        help="write index.json for shards; after a kill, the same command continues",
        epilog=_example('index "data/photos/train-*.tar"'),
    )
    index.add_argument("shards", metavar="SHARDS", help="glob, brace pattern or URL, quoted")
    index.add_argument("--out", type=_local_path, help="default: index.json in the shards' folder")
    index.add_argument(
        "--chunk-samples", type=int, default=32, help="samples that are read together; default: 32"
    )
    index.add_argument(
        "--allow-damaged", action="store_true", help="index what precedes the damage in a broken shard"
    )
    _add_keys(index)
    _add_workers(index, cores)

    verify = add(
        "verify",
        help="read every shard again and compare it with its index",
        epilog=_example("verify data/photos/index.json"),
    )
    verify.add_argument("index", metavar="INDEX")
    verify.add_argument("--decode", action="store_true", help="also decode every image")
    _add_workers(verify, cores)

    stats = add(
        "stats",
        help="print counts, sizes, labels and resolutions",
        epilog=_example("stats data/photos/index.json --png stats.png"),
    )
    stats.add_argument("index", metavar="INDEX")
    stats.add_argument("--png", type=_local_path, metavar="OUT", help="also draw the histograms")
    _add_dedup(add, cores)

    warm = add(
        "warm",
        help="fill this node's engine.cache_dir before a run; after a kill, the same command continues",
        epilog=_example("warm mine.toml"),
    )
    warm.add_argument(
        "configs", nargs="+", metavar="CONFIG.toml", help="of the run; section.key=value wins over all"
    )
    return parser.parse_args(argv)


def _add_pack(add: Any, cores: int) -> None:
    pack = add(
        "pack",
        help="write images to shards; after a kill, the same command continues",
        epilog=_example("pack photos/ data/photos --short-side 256"),
    )
    pack.add_argument(
        "source", metavar="SOURCE", help="folder, archive, table, index, or quoted pattern of shards"
    )
    pack.add_argument("out", type=_local_path, metavar="OUT")
    pack.add_argument(
        "--format",
        choices=FORMAT_NAMES,
        default="imagefolder",
        metavar="FORMAT",
        help=f"{', '.join(PLAIN_FORMATS)}, or for VTAB-1k vtab/TASK, with one of {', '.join(TASKS)}; "
        "default: imagefolder",
    )
    pack.add_argument("--samples-per-shard", type=int, default=1000, help="default: 1000")
    pack.add_argument("--seed", type=int, default=0, help="seed of the shuffle; default: 0")
    pack.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    pack.add_argument(
        "--short-side",
        type=int,
        default=0,
        help="re-encode images whose short side has more pixels; 0, the default, keeps all as they are",
    )
    pack.add_argument("--quality", type=int, default=90, help="of re-encoded JPEGs, 1 to 100; default: 90")
    pack.add_argument(
        "--labels",
        choices=["fine", "coarse"],
        default="fine",
        help="which labels of CIFAR-100; default: fine",
    )
    pack.add_argument(
        "--val-images", default="", help="ImageNet-1k: ILSVRC2012_img_val.tar, or the folder of its JPEGs"
    )
    pack.add_argument(
        "--val-labels",
        default="",
        help="ImageNet-1k: a text file with one synset per line, in the order of the file names; "
        "imagenet_real: real.json",
    )
    pack.add_argument(
        "--membership",
        default="",
        help="VTAB-1k: what says which images train: for sun397 the folder of TFDS's lists, or its wheel; "
        "for kitti_distance devkit_object.zip; for caltech101 a text file with one training image per line",
    )
    _add_keys(pack)
    _add_workers(pack, cores)
    pack.add_argument("--overwrite", action="store_true", help="start over and replace the shards in OUT")


def _add_dedup(add: Any, cores: int) -> None:
    dedup = add(
        "dedup",
        help="list training images that are copies of test images",
        epilog=_example(
            'dedup data/in21k/index.json --against "data/cifar10/test-*.tar" '
            "--out data/in21k/duplicates.json --sheet duplicates.png"
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
        "--out",
        type=_local_path,
        required=True,
        metavar="FILE",
        help="the list, for data.exclude of a config",
    )
    dedup.add_argument(
        "--threshold",
        type=int,
        help="in how many of 128 bits the hashes of copies may differ, 0 to 32; default: 24, and fewer, down "
        "to 8, for test sets whose own images look more alike than that",
    )
    _add_workers(dedup, cores)
    dedup.add_argument(
        "--sheet", type=_local_path, metavar="PNG", help="also draw the 24 most doubtful pairs side by side"
    )


def _add_keys(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image-key",
        default="jpg;jpeg;png;webp",
        help="extensions of the image in existing shards, the first that is there; default: %(default)s",
    )
    command.add_argument(
        "--label-key",
        default="cls;json",
        help="extensions of the label, or a field of KEY.json like class_id; default: %(default)s",
    )
    command.add_argument(
        "--classes",
        default="",
        metavar="FILE",
        help='for labels that are class names: {"cat": 0, ...} or a list as JSON, or one name per line',
    )


def _add_workers(command: argparse.ArgumentParser, cores: int) -> None:
    command.add_argument(
        "--workers",
        type=int,
        default=cores,
        help=f"number of processes; 0 works without any; default: {cores}, one per core",
    )


def _local_path(path: str) -> Path:
    if "://" in path:  # Path would make a folder of that name here
        raise argparse.ArgumentTypeError(f"{path} is not a local path; write there, and copy it to the store")
    return Path(path)


def _example(command: str) -> str:
    return f"example: python tools/data.py {command}"
