#!/usr/bin/env python3
"""Estimate what a config takes on a cluster: memory, speed, data, checkpoints, days, cost."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/plan.py configs/pretrain/vit_h14_jft.toml --gpus 128 --price 2.5
  python tools/plan.py configs/pretrain/vit_b16_in21k.toml --gpus 8 --gpu a100
  python tools/plan.py configs/pretrain/vit_h14_jft.toml --gpus 8 --gpu h200 \\
      --calibrate tools/results/h200.json

No data need to be there: epochs are those of data.num_samples. Every figure is an estimate; docs/planning.md
says how each is made, and which are guesses"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)

    from vitscale import command

    return command.run(lambda: plan(arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG.toml",
        help="TOML files of one run, later ones win; section.key=value wins over all",
    )
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="of all nodes together")
    add(
        "--calibrate",
        type=Path,
        metavar="RESULTS.json",
        help="take speeds from this file of tools/bench.py step, in place of guesses",
    )
    add("--json", type=Path, metavar="OUT.json", help="also write the plan to this file")
    # What is not given is left to the defaults of a Cluster.
    option = functools.partial(add, default=argparse.SUPPRESS)
    option("--gpu", help="their kind, as h100, h200, a100 or b200; default: h100")
    option("--gpu-memory-gb", type=float, help="of each; default: by the data sheet")
    option("--gpus-per-node", type=int, help="default: 8")
    option("--nic-gbit", type=float, help="Gbit/s of the network card of each GPU; default: 400")
    option("--price", type=float, help="of a GPU for an hour, in any currency")
    option("--cores-per-node", type=int, help="that may decode; default: as many as it takes")
    option("--decode-rate", type=float, help="images/s of a core; default: measured, or 500")
    option("--image-kb", type=float, help="mean size of a stored image; default: 110")
    option("--failures-per-node-day", type=float, help="default: 0.0065")
    option("--restart-minutes", type=float, help="from a failure to the next step; default: 10")
    option("--store-gb-per-s", type=float, help="at which checkpoints are written; default: 2")
    return parser.parse_intermixed_args(argv)


def plan(arguments: argparse.Namespace) -> int:
    from vitscale import config
    from vitscale.plan import text
    from vitscale.plan.make import Cluster, make_plan
    from vitscale.plan.speed import Speed, read_measurements
    from vitscale.system import atomic
    from vitscale.train_config import TrainConfig

    if arguments.json:
        atomic.check_writable(arguments.json, ".json")
    names = [field.name for field in dataclasses.fields(Cluster) if field.name in arguments]
    options = {name: getattr(arguments, name) for name in names}
    numbers = {f"--{name.replace('_', '-')}": options[name] for name in names if name != "gpu"}
    config.positive("", **numbers)  # a Cluster takes 0 for what is not known
    speed = read_measurements(arguments.calibrate) if arguments.calibrate else Speed()
    loaded = config.load(TrainConfig, *config.divided(arguments.configs))
    made = make_plan(loaded, Cluster(**options), speed)
    if arguments.json:
        values = json.dumps({"results": text.results(made)}, indent=1) + "\n"
        atomic.write(arguments.json, values.encode())
    print(text.render(made))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
