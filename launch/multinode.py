#!/usr/bin/env python3
"""What launch/multinode.sh runs: Ctrl-C while it imports ends it as later."""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    from vitscale import command

    return command.run(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    from vitscale.cluster import multinode

    return multinode.main(argv)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
