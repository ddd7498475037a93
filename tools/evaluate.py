#!/usr/bin/env python3
"""Evaluate a checkpoint: what its features are good for, or the accuracy of its head."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python tools/evaluate.py fewshot runs/demo --data data/cifar10 --shots 1,5,10
  python tools/evaluate.py knn runs/demo --data data/cifar10 --cache features
  python tools/evaluate.py linear runs/demo --data data/cifar10 --cache features
  python tools/evaluate.py classify runs/demo --data 'data/cifar10/test-*.tar' --json result.json
  python tools/evaluate.py classify runs/photos --split validation --crop center
  deepspeed tools/evaluate.py classify runs/vit_b16 --data 's3://bucket/val-{000..063}.tar' --crop center

CKPT is a run directory (its newest good checkpoint), a step directory, or an export."""
PROBES = ("fewshot", "knn", "logistic", "linear")  # fitted to a training set
EXAMPLE = {
    "fewshot": "fewshot runs/demo --train 'data/cifar10/train-*.tar' --test 'data/cifar10/test-*.tar'",
    "knn": "knn runs/demo --data data/cifar10 --k 10,20 --cache features",
    "logistic": "logistic runs/demo --data data/cifar10 --c 0.01,0.1,1 --cache features",
    "linear": "linear runs/demo --data data/cifar10 --cache features",
    "kmeans": "kmeans runs/demo --data 'data/cifar10/test-*.tar'",
    "classify": "classify runs/demo --data 'data/cifar10/test-*.tar'",
    "finetune": "finetune runs/vit_b16 --recipe configs/finetune/cifar100_384.toml --out results/cifar100",
    "vtab": "vtab runs/vit_l16 --data data/vtab --out results/vtab --seeds 0,1,2",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.kind in PROBES and not (args.data or (args.train and args.test)):
        parser.error(
            f"{args.kind} needs --data FOLDER (with train-*.tar and test-*.tar), or --train and --test"
        )
    if args.kind == "kmeans" and not args.data:
        parser.error("kmeans needs --data SHARDS")
    if args.kind == "classify" and bool(args.data) == bool(args.split):
        parser.error("classify needs --data SHARDS, or --split validation for the run's own; not both")
    if (slots := getattr(args, "slots", None)) is not None and slots < 1:
        parser.error(f"--slots {slots} must be above 0")
    # Torch is imported after the arguments are known to be right, so that --help is instant.
    from vitscale import command

    action = {"vtab": run_vtab, "finetune": run_finetune}.get(args.kind, run)
    return command.run(lambda: action(args))


def run_vtab(args: argparse.Namespace) -> int:
    from vitscale.finetune.vtab import VtabConfig, run

    scores = run(
        VtabConfig(
            checkpoint=args.checkpoint,
            data=Path(args.data),
            out=Path(args.out),
            protocol=args.protocol,
            tasks=tuple(args.tasks.split(",")) if args.tasks else VtabConfig.tasks,
            seeds=tuple(args.seeds),
            overrides=tuple(args.set),
            slots=args.slots or 0,
        )
    )
    print(f"\n{scores.text()}\n\nIn {args.out}: results.json, results.md and, with matplotlib, results.png")
    return 0


def run(args: argparse.Namespace) -> int:
    from vitscale import distributed
    from vitscale.config import from_dict
    from vitscale.evals import EvalConfig
    from vitscale.evaluate import evaluate

    distributed.initialize()
    config = distributed.together(lambda: from_dict(EvalConfig, _config_values(args)))
    distributed.on_main(lambda: _check_outputs(args))
    slot = "ema" if args.ema else "fp32"
    outcome = evaluate(
        args.checkpoint,
        args.kind,
        config,
        distributed.device(),
        slot,
        cache=getattr(args, "cache", ""),
        predictions=getattr(args, "predictions", ""),
    )
    if distributed.is_main():
        _report(outcome, args.json)
    return 0


def run_finetune(args: argparse.Namespace) -> int:
    from vitscale.finetune.grid import run

    result = run(args.checkpoint, args.recipe, Path(args.out), tuple(args.set), args.slots or 0)
    print(f"\n{result.text()}\n\nIn {args.out}: results.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="kind", required=True)
    fewshot = _probe(commands, "fewshot", "least squares on a few training images (mean over seeds)")
    fewshot.add_argument("--shots", type=_integers, help="images per class, like 1,5,10")
    fewshot.add_argument("--seeds", type=_integers, help="draws to average over, like 0,1,2")
    fewshot.add_argument("--l2-reg", type=float, help="ridge regularisation (1024 as published)")

    knn = _probe(commands, "knn", "weighted votes of the nearest training images")
    knn.add_argument("--k", type=_integers, help="how many of them vote, like 10,20,100")
    knn.add_argument("--temperature", type=float, help="of the votes (0.07 as published)")

    logistic = _probe(commands, "logistic", "logistic regression")
    logistic.add_argument("--c", type=_floats, help="inverse penalties to choose among, like 0.01,0.1,1")

    linear = _probe(commands, "linear", "a linear layer trained by SGD, at many learning rates at once")
    linear.add_argument("--learning-rates", type=_floats, help="to choose among, like 0.01,0.1")
    linear.add_argument("--epochs", type=int, help="of the training")
    linear.add_argument("--batch", type=int, help="images in a step of the training")
    for command in (logistic, linear):
        command.add_argument("--dev-fraction", type=float, help="of the training images, to choose by (0.1)")
        command.add_argument("--seed", type=int, help="of that choice")

    kmeans = _command(commands, "kmeans", "clusters of the features, compared with the classes")
    _add_test_data(kmeans)
    _add_cache(kmeans)
    kmeans.add_argument("--clusters", type=int, help="how many; default: as many as classes")
    kmeans.add_argument("--seed", type=int, help="of the starts")

    classify = _command(commands, "classify", "top-1 and top-5 accuracy of the model's head")
    _add_test_data(classify)
    classify.add_argument(
        "--split",
        choices=("validation",),
        help="what data.validation_fraction kept from the training of the run",
    )
    classify.add_argument(
        "--label-map", metavar="FILE.json", help="from the labels of --data to the model's, as data.label_map"
    )
    classify.add_argument(
        "--predictions", default="", metavar="OUT.jsonl", help="write a line for each image, with its key"
    )
    _add_finetunings(commands)
    return parser


def _add_finetunings(commands: Any) -> None:
    """What starts training runs, in a folder where the same command continues after a kill."""
    finetune = _add(commands, "finetune", "choose a rate on dev images, then train by seeds, and score")
    finetune.add_argument(
        "--recipe", required=True, metavar="CONFIG.toml", help="with [finetune] and a test set in [evals]"
    )
    vtab = _add(commands, "vtab", "the 19 tasks of VTAB-1k, fine-tuned or probed")
    vtab.add_argument("--data", required=True, metavar="FOLDER", help="with a folder of shards for each task")
    vtab.add_argument(
        "--protocol",
        choices=("paper", "light", "linear"),
        default="paper",
        help="paper: 2,500 steps at 384 px; light: VTAB's sweep of 4 at 224 px; linear: frozen features",
    )
    vtab.add_argument("--tasks", metavar="A,B", help="default: all 19")
    vtab.add_argument("--seeds", type=_integers, default=[0], help="like 0,1,2; default: 0")
    for command in (finetune, vtab):
        command.add_argument(
            "--out", required=True, metavar="FOLDER", help="for the runs and the results; continues there"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="of the runs' configs; repeatable"
        )
        command.add_argument("--slots", type=int, help="processes at a time; default: one on each GPU, or 1")


def _probe(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """A kind that fits something to the features of a training set."""
    command = _command(commands, name, f"{summary}, on frozen features")
    command.add_argument(
        "--data", metavar="FOLDER", help="folder or URL that holds train-*.tar and test-*.tar"
    )
    command.add_argument("--train", metavar="SHARDS", help="training shards, or an index.json")
    command.add_argument("--test", metavar="SHARDS", help="test shards, or an index.json")
    _add_cache(command)
    return command


def _add_test_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", metavar="SHARDS", help="test shards, an index.json, or a folder with test-*.tar"
    )


def _add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache", default="", metavar="FOLDER", help="keep the features there for the next command"
    )


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command = _add(commands, name, summary)
    command.add_argument(
        "--crop",
        choices=("resize", "resize_center", "center"),
        help="squeeze to the model's image size, squeeze and centre crop, or centre crop alone",
    )
    command.add_argument("--batch-size", type=int, help="images at a time on each device")
    command.add_argument("--num-workers", type=int, help="decoding processes on each rank")
    command.add_argument(
        "--ema", action="store_true", help="use the average of the weights (optim.ema_decay)"
    )
    command.add_argument("--json", metavar="OUT.json", help="also write the results to this file")
    return command


def _add(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  python tools/evaluate.py {EXAMPLE[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CKPT", help="run directory, step directory or export")
    return command


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas, like 1,5,10") from None


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas, like 0.01,0.1") from None


def _config_values(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line sets of [evals.NAME]; the other keys keep their defaults."""
    values = {key: value for key, value in vars(args).items() if value is not None}
    for key in ("checkpoint", "json", "local_rank", "data", "ema", "cache", "predictions"):
        values.pop(key, None)
    if not args.data:
        return values
    folder = (glob.escape(args.data) if os.path.isdir(args.data) else args.data).rstrip("/")
    if args.kind in PROBES:
        return {"train": f"{folder}/train-*.tar", "test": f"{folder}/test-*.tar", **values}
    is_shards = args.data.endswith((".tar", ".json"))
    return {"test": args.data if is_shards else f"{folder}/test-*.tar", **values}


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written at the end, when all is computed."""
    from vitscale.system import atomic

    if args.json:
        atomic.check_writable(args.json, ".json")
    if predictions := getattr(args, "predictions", ""):
        atomic.check_writable(predictions, ".jsonl")
    if cache := getattr(args, "cache", ""):
        atomic.check_folder(cache)


def _report(outcome: dict[str, Any], path: str | None) -> None:
    from vitscale.system import atomic

    if path:
        atomic.write(path, (json.dumps(outcome, indent=2) + "\n").encode())
    print(f"{outcome['checkpoint']}  step {outcome['step']:,}")
    for name, value in outcome["results"].items():
        print(f"  {name:<14}{value:>10,}" if isinstance(value, int) else f"  {name:<14}{value:>10.4f}")
    if details := outcome.get("details"):
        print_details(details)


def print_details(details: dict[str, Any]) -> None:
    """What a person asks next: whether to trust its probabilities, and where it is wrong."""
    print(f"  calibration error {details['calibration_error']:.4f}")
    classes = sorted(details["per_class"], key=lambda row: row["accuracy"])
    shown = [f"{row['name']} {row['accuracy']:.2f}" for row in classes]
    text = ", ".join(shown) if len(shown) <= 5 else f"from {', '.join(shown[:3])} to {shown[-1]}"
    print(f"  accuracy by class: {text}")
    for row in details["confusions"][:3]:
        print(f"  {row['class']} is taken for {row['taken_for']} {row['count']:,} times")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
