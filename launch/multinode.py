#!/usr/bin/env python3
"""What launch/multinode.sh runs: a job on many hosts, started again until it is done."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  bash launch/multinode.sh hostfile configs/pretrain/vit_b16_in21k.toml
  bash launch/multinode.sh hostfile CONFIG.toml --min-hosts 1                      fewer hosts will do, too
  bash launch/multinode.sh hostfile CONFIG.toml --no-ssh --node-rank 1 --master-addr node1     on each host

exit status: 0 the run is done; 75 stopped by a signal: the same command continues; 1 a store does not
answer now; 2 something that you can fix, or stopped by RUN/stop"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description="Run a job on many hosts, and start it again after losses, until it is done.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hostfile", metavar="HOSTFILE", help="lines like `node1 slots=8`")
    parser.add_argument("configs", nargs="+", metavar="CONFIG.toml", help="as for launch/train.py")
    parser.add_argument(
        "--min-hosts",
        "--min_hosts",
        type=int,
        default=0,
        metavar="N",
        help="leave out hosts that do not answer, as long as N are left (default: wait for all)",
    )
    parser.add_argument("--pause", type=float, default=10.0, metavar="SECONDS", help="before a restart (10)")
    parser.add_argument(
        "--max-vain",
        "--max_vain",
        type=int,
        default=5,
        metavar="N",
        help="starts in a row without a new checkpoint (5)",
    )
    add = parser.add_argument
    add("--master-addr", "--master_addr", default="", help="of the first host, as the others reach it")
    add("--master-port", "--master_port", type=int, default=29500, help="where the ranks meet (29500)")
    add("--no-ssh", "--no_ssh", action="store_true", help="given on every host: start its processes only")
    add("--node-rank", "--node_rank", type=int, help="with --no-ssh: this host's line, from 0")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.no_ssh and (arguments.node_rank is None or not arguments.master_addr):
        parser.error(
            "--no-ssh needs --node-rank N, this host's line in the hostfile from 0, and --master-addr"
        )
    from vitscale import command

    return command.run(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from vitscale.cluster.multinode import Launch

    return Launch(arguments).run()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
