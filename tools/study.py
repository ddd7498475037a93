#!/usr/bin/env python3
"""Run a scaling study, many models and data sizes, and plot it beside the paper's figures."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/study.py list configs/study/table6.toml
  python tools/study.py run configs/study/miniature.toml
  python tools/study.py run configs/study/table6.toml --only 'ViT-B/16' --launcher 'deepspeed --num_gpus 8'
  python tools/study.py plot configs/study/miniature.toml plots/
  python tools/study.py table2 configs/study/table2.toml

list     size, compute, state and metric of each run; no data need to be there
run      do what is left; a killed run is resumed
plot     OUT/by_compute.png (Figures 5, right, and 8), by_data.png (Figures 3 and 4) and, after five recipes,
         by_compute_average5.png (Figure 5, left), beside the paper's points
table2   the paper's Table 2, with the results of all recipes of a study

docs/studies.md has more."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)

    from vitscale import command

    return command.run(lambda: study(arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in {
        "list": "say what its runs are",
        "run": "do what is left of it",
        "plot": "draw what it has found",
        "table2": "print Table 2 with what it has found",
    }.items():
        add = commands.add_parser(name, help=told).add_argument
        add("study", metavar="STUDY.toml")
        if name == "plot":
            add("out", metavar="OUT", type=Path, help="a folder")
        add(
            "--only",
            action="append",
            default=[],
            metavar="MODEL",
            help="this model; repeatable; default: all",
        )
        add(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="of the configs of all runs; repeatable",
        )
        if name == "run":
            add("--slots", type=int, help="runs at a time; default: one on each GPU, or 1")
            add(
                "--launcher",
                default="",
                help="starts each training, like 'deepspeed --num_gpus 8'; then one at a time",
            )
    arguments = parser.parse_args(argv)
    if (slots := getattr(arguments, "slots", None)) is not None and slots < 1:
        parser.error(f"--slots {slots} must be above 0")
    try:
        arguments.launcher = shlex.split(getattr(arguments, "launcher", ""))
    except ValueError as error:
        parser.error(f"--launcher {arguments.launcher} is no command: {error}")
    return arguments


def study(arguments: argparse.Namespace) -> int:
    from vitscale import config
    from vitscale.study import figures, text
    from vitscale.study.cells import cells
    from vitscale.study.config import StudyConfig
    from vitscale.study.run import run

    loaded = config.load(StudyConfig, [arguments.study])
    if arguments.command == "run":
        run(
            loaded,
            only=arguments.only,
            overrides=arguments.set,
            count=arguments.slots or 0,
            launcher=arguments.launcher,
        )
    found = cells(loaded, arguments.only, arguments.set)
    match arguments.command:
        case "plot":
            for path in figures.draw(loaded, found, arguments.out):
                print(path)
        case "table2":
            print(text.table2(loaded, found))
        case _:
            print(text.listed(loaded, found))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
