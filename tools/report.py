#!/usr/bin/env python3
"""Print the first and last numbers of runs, or write all about them to a page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/report.py runs/shapes runs/digits                      first and last losses and evaluations
  python tools/report.py runs/shapes --out shapes.html                a page to look at: curves, data, images
  python tools/report.py runs/a runs/b --out ab.html --no-images      two runs compared, the data unopened"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", metavar="OUT.html", help="write a page that needs no network and no other file"
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="with --out: open neither the data nor a checkpoint, for pictures and predictions",
    )
    arguments = parser.parse_args(argv)
    if arguments.no_images and not arguments.out:
        parser.error("--no-images is for a page: name it with --out")

    from vitscale import command

    return command.run(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> int:
    if not arguments.out:
        from vitscale.report.runs import render

        print(render(arguments.runs))
        return 0
    from vitscale.quantities import size_text
    from vitscale.report.page.build import write_page

    num_bytes = write_page(arguments.runs, arguments.out, with_images=not arguments.no_images)
    print(f"{arguments.out}: {size_text(num_bytes)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
