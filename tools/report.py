#!/usr/bin/env python3
"""Print the first and last loss of runs, and the first and last results of every evaluation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """example:
  python tools/report.py runs/shapes runs/digits"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    arguments = parser.parse_args(argv)

    from vitscale import command

    return command.run(lambda: report(arguments.runs))


def report(runs: Sequence[str]) -> int:
    from vitscale.report.runs import render

    print(render(runs))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
