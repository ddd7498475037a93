#!/usr/bin/env python3
"""What runs have come to: first and last loss, and every evaluation before and after, from their
metrics.jsonl.
"""

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

    from vitscale.metrics import FILE_NAME, read_metrics

    print(f"{'run':<24} {'number':<28} {'first':>10} {'last':>10}   steps")
    for run in arguments.runs:
        path = Path(run) / FILE_NAME
        if not path.is_file():
            print(
                f"error: {path} does not exist: {run} is not a run directory, or logged nothing yet",
                file=sys.stderr,
            )
            return 2
        rows = read_metrics(path)
        names = dict.fromkeys(
            name for row in rows for name in row if name == "train/loss" or name.startswith("eval/")
        )
        for name in (name for name in names if not name.endswith(("_std", "num_samples"))):
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            print(f"{run:<24} {name:<28} {values[0]:>10.4f} {values[-1]:>10.4f}   {steps[0]} to {steps[-1]}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
