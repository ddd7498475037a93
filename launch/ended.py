#!/usr/bin/env python3
"""How the last start of a run ended, by its status.json, for scripts that start it again."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """example:
  since=$(date +%s); srun python launch/train.py CONFIG.toml
  python launch/ended.py CONFIG.toml --since $since --launcher-status $?

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
    parser.add_argument(
        "--since",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="when this start began (date +%%s); an older status.json is that of an earlier start. Only with "
        "it is the start counted for --max-vain",
    )
    parser.add_argument(
        "--node",
        type=int,
        default=0,
        metavar="N",
        help="this node's number, where several ask after the same start: only node 0 counts it (default: 0)",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.max_vain < 1:
        parser.error(f"--max-vain {arguments.max_vain} must be at least 1")
    if not 0 <= arguments.since < math.inf:
        parser.error(f"--since {arguments.since:g} must be seconds since 1970, as date +%s prints them")
    from vitscale import command

    return command.run(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from vitscale import config
    from vitscale.cluster import restarts
    from vitscale.train_config import TrainConfig

    paths, overrides = config.divided(arguments.configs)
    loaded = config.load(TrainConfig, paths, overrides)
    decision = restarts.after(
        loaded,
        arguments.launcher_status,
        arguments.max_vain,
        since=arguments.since,
        node=arguments.node,
    )
    print(f"{decision.kind}: {decision.reason}", flush=True)
    return restarts.EXIT_STATUS[decision.kind]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
