#!/usr/bin/env python3
"""Check that hosts can run a job together: one table, and a sentence for all that is wrong."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python launch/preflight.py hostfile configs/pretrain/vit_b16_in21k.toml           over ssh, from any host
  srun python launch/preflight.py configs/pretrain/vit_b16_in21k.toml               as ranks
  python launch/preflight.py configs/demo/shapes.toml run_dir=runs/a --facts        this host, as JSON

exit status: 0 the hosts fit together; 1 a store does not answer now; 2 they do not: sentences say why"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="[HOSTFILE] CONFIG.toml",
        help="lines like `node1 slots=8`, without it the ranks of a launcher; then as for launch/train.py",
    )
    parser.add_argument("--facts", action="store_true", help="print what this host says of itself, as JSON")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)  # what ssh starts
    arguments = parser.parse_intermixed_args(argv)
    if arguments.answer:
        from vitscale.cluster.preflight.rounds import answer_asker

        return answer_asker()
    if not any(text.endswith(".toml") for text in arguments.arguments):
        parser.error("name a config: launch/preflight.py [HOSTFILE] CONFIG.toml [section.key=value ...]")
    from vitscale import command

    return command.run(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from vitscale.cluster.preflight import program

    given = arguments.arguments
    if arguments.facts:
        print(program.own_facts(given))
        return 0
    over_ssh = not given[0].endswith(".toml") and "=" not in given[0]
    return program.over_ssh(given[0], given[1:]) if over_ssh else program.among_ranks(given)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    status = main()
    from vitscale import command

    command.leave(status)
