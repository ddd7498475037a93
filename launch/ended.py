#!/usr/bin/env python3
"""How the last start of a run ended, by its status.json, for scripts that start it again."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """example:
  srun python launch/train.py CONFIG.toml; python launch/ended.py CONFIG.toml --launcher-status $?

exit status: 0 the run is done; 75 start it again; 2 stop, the line that is printed says why"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG.toml", help="as for launch/train.py")
    parser.add_argument("--launcher-status", type=int, metavar="N", help="what the launcher returned")
    parser.add_argument(
        "--max-vain",
        type=int,
        default=5,
        metavar="N",
        help="stop after so many starts in a row without a new checkpoint (default: 5)",
    )
    arguments = parser.parse_intermixed_args(argv)
    from vitscale import command

    return command.run(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from vitscale import config, restarts
    from vitscale.train_config import TrainConfig

    paths, overrides = config.divided(arguments.configs)
    loaded = config.load(TrainConfig, paths, overrides)
    decision = restarts.after(loaded, arguments.launcher_status, arguments.max_vain)
    print(f"{decision.kind}: {decision.reason}", flush=True)
    return restarts.EXIT_STATUS[decision.kind]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
