#!/usr/bin/env python3
"""Draw what a ViT has learned: the figures of the paper, of any checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/visualize.py filters runs/demo filters.png
  python tools/visualize.py posemb imported/vit_l32 posemb.png
  python tools/visualize.py attention-distance runs/demo distance.png --data 'data/cifar10/test-*.tar'
  python tools/visualize.py attention-map imported/vit_l16 maps.png --images dog.jpg plane.jpg

filters             principal components of the patch embedding (Figure 7, left)
posemb              similarity of the position embeddings (Figure 7, centre)
attention-distance  mean distance of attention, by head and layer, over 128 images (Figure 7, right)
attention-map       attention to the parts of each image, by rollout (Figures 6 and 14)

CKPT is a run directory (its newest good checkpoint), a step directory, or an export. OUT is a PNG; it
needs matplotlib: bash tools/setup.sh plots."""
FIGURES = ["filters", "posemb", "attention-distance", "attention-map"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("--data", metavar="SHARDS", default="", help="take the images evenly from these")
    parser.add_argument("--images", metavar="FILE", nargs="+", default=[], help="or these image files")
    parser.add_argument(
        "--count", metavar="N", type=int, help="images from --data; default: 128, or 8 for maps"
    )
    parser.add_argument("--ema", action="store_true", help="take the average over training (optim.ema_decay)")
    arguments = parser.parse_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error(f"--count {arguments.count} must be above 0")
    if arguments.figure in ("filters", "posemb") and (arguments.data or arguments.images or arguments.count):
        parser.error(f"{arguments.figure} shows weights alone: leave out --data, --images and --count")
    if arguments.images and arguments.count:
        parser.error("--count is of the images from --data: of --images all are taken")

    from vitscale import command

    return command.run(lambda: visualize(arguments))


def visualize(arguments: argparse.Namespace) -> int:
    from vitscale.inspection import run
    from vitscale.system import atomic

    atomic.check_writable(arguments.out, ".png")
    pictures = run.Pictures(data=arguments.data, files=arguments.images, count=arguments.count or 0)
    slot = "ema" if arguments.ema else "fp32"
    run.visualize(arguments.figure, arguments.checkpoint, arguments.out, pictures, slot=slot)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
