#!/usr/bin/env python3
"""Evaluate a checkpoint: few-shot accuracy of its features, or the accuracy of its head."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python tools/evaluate.py fewshot runs/demo --data data/cifar10 --shots 1,5,10
  python tools/evaluate.py classify runs/demo --data 'data/cifar10/test-*.tar' --json result.json
  python tools/evaluate.py classify runs/photos --split validation --crop center
  deepspeed tools/evaluate.py classify runs/vit_b16 --data 's3://bucket/val-{000..063}.tar' --crop center

CKPT is a run directory (its newest good checkpoint), a step directory, or an export."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.kind == "fewshot" and not (args.data or (args.train and args.test)):
        parser.error("fewshot needs --data FOLDER (with train-*.tar and test-*.tar), or --train and --test")
    if args.kind == "classify" and bool(args.data) == bool(args.split):
        parser.error("classify needs --data SHARDS, or --split validation for the run's own; not both")
    # Torch is imported after the arguments are known to be right, so that --help is instant.
    from vitscale import command

    return command.run(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    from vitscale import distributed
    from vitscale.config import from_dict
    from vitscale.evals import EvalConfig
    from vitscale.evaluate import evaluate

    distributed.initialize()
    config = distributed.together(lambda: from_dict(EvalConfig, _config_values(args)))
    slot = "ema" if args.ema else "fp32"
    outcome = evaluate(args.checkpoint, args.kind, config, distributed.device(), slot)
    if distributed.is_main():
        _report(outcome, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="kind", required=True, metavar="{fewshot,classify}")

    fewshot = _command(
        commands,
        "fewshot",
        "least squares on the features of a few training images (mean over seeds)",
        "example:\n  python tools/evaluate.py fewshot runs/demo "
        "--train 'data/cifar10/train-*.tar' --test 'data/cifar10/test-*.tar'",
    )
    fewshot.add_argument(
        "--data", metavar="FOLDER", help="folder or URL that holds train-*.tar and test-*.tar"
    )
    fewshot.add_argument(
        "--train", metavar="SHARDS", help="training shards to draw the shots from, or an index.json"
    )
    fewshot.add_argument("--test", metavar="SHARDS", help="test shards, or an index.json")
    fewshot.add_argument("--shots", type=_integers, help="images per class, like 1,5,10")
    fewshot.add_argument("--seeds", type=_integers, help="draws to average over, like 0,1,2")
    fewshot.add_argument("--l2-reg", type=float, help="ridge regularisation (1024 as published)")

    classify = _command(
        commands,
        "classify",
        "top-1 and top-5 accuracy of the model's head",
        "example:\n  python tools/evaluate.py classify runs/demo --data 'data/cifar10/test-*.tar'",
    )
    classify.add_argument(
        "--data",
        metavar="SHARDS",
        help="test shards, an index.json, or a folder with test-*.tar",
    )
    classify.add_argument(
        "--split",
        choices=("validation",),
        help="what data.validation_fraction kept from the training of the run",
    )
    return parser


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CKPT", help="run directory, step directory or export")
    command.add_argument("--crop", choices=("resize", "center"), help="squeeze to a square, or centre crop")
    command.add_argument("--batch-size", type=int, help="images at a time on each device")
    command.add_argument("--num-workers", type=int, help="decoding processes on each rank")
    command.add_argument(
        "--ema", action="store_true", help="use the average of the weights (optim.ema_decay)"
    )
    command.add_argument("--json", metavar="OUT", help="also write the results to this file")
    return command


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas, like 1,5,10") from None


def _config_values(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line sets of [evals.NAME]; the other keys keep their defaults."""
    values = {key: value for key, value in vars(args).items() if value is not None}
    for key in ("checkpoint", "json", "local_rank", "data", "ema"):
        values.pop(key, None)
    if not args.data:
        return values
    if args.kind == "fewshot":
        folder = args.data.rstrip("/")
        return {"train": f"{folder}/train-*.tar", "test": f"{folder}/test-*.tar", **values}
    is_shards = args.data.endswith((".tar", ".json"))
    return {"test": args.data if is_shards else f"{args.data.rstrip('/')}/test-*.tar", **values}


def _report(outcome: dict[str, Any], path: str | None) -> None:
    from vitscale import atomic

    print(f"{outcome['checkpoint']}  step {outcome['step']:,}")
    for name, value in outcome["results"].items():
        print(f"  {name:<14}{value:>10,}" if isinstance(value, int) else f"  {name:<14}{value:>10.4f}")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, (json.dumps(outcome, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
