#!/usr/bin/env python3
"""Measure vitscale beside its baselines in one run: prints a table, writes JSON if asked."""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
EXAMPLE = """examples:
  python tools/bench.py data --shards "data/imagenet/train-*.tar"
  python tools/bench.py order --samples 303000000 --shards 30000 --world 1024 --json order.json
  python tools/bench.py sorted --samples 50000 --classes 10 --global-batch 128
  python tools/bench.py checkpoint --variant B/16 --ranks 2 --json checkpoint.json
  python tools/bench.py step configs/pretrain/vit_b16_in21k.toml --batch 256
  python tools/bench.py step --suite tools/results/gpu.json --index data/imagenet/index.json
  python tools/bench.py inference --json inference.json --plot inference.png
  python tools/bench.py scale --ranks 1024,4096 --variant H/14 --zero 1,3"""
SECONDS_BETWEEN_LINES = 5
# What `step` compares: who trains, how, and what is recomputed in the backward pass.
STEP_CASES = {
    "loops": ["vitscale", "plain", "timm"],
    "modes": ["eager", "compiled"],
    "policies": ["none", "selective", "full"],
}
# Options of `step` that the suite does not take, and those that only the suite takes.
STEP_SETTINGS = ("variant", "precision", "rounds", "steps")
SUITE_SETTINGS = ("index", "variants")
SUITE_VARIANTS = ("S/16", "B/16", "L/16", "H/14")
# What `inference` measures by default: Figure 12, and batches of up to so many images.
FIGURE12_MODELS = ("R50x1", "R50x2", "B/32", "L/32", "B/16", "L/16", "H/14", "R152x4")
FIGURE12_SIZES = (64, 128, 224, 384, 512)
MAX_BATCH_CPU, MAX_BATCH_GPU = 64, 65_536


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)

    from vitscale import command

    return command.run(lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    from vitscale.system import atomic

    if arguments.json:
        atomic.check_writable(arguments.json, ".json")
    results = COMMANDS[arguments.command](arguments)
    write(arguments, results)
    print_table(results)
    return 0


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the file of --json, if there is one."""
    from vitscale.system import atomic

    if arguments.json:
        values = json.dumps({"bench": arguments.command, "results": results}, indent=1) + "\n"
        atomic.write(arguments.json, values.encode())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    data = commands.add_parser(
        "data",
        help="images per second of one core, beside Pillow, webdataset and the decoder alone",
        epilog='example: python tools/bench.py data --shards "data/imagenet/train-*.tar"',
    )
    data.add_argument("--shards", required=True, help="glob or brace pattern, quoted, or an index.json")
    data.add_argument("--image-size", type=int, default=224, help="of the views, in pixels")
    data.add_argument(
        "--crop",
        choices=["inception", "tensorflow", "torchvision", "proportional", "pad", "resize"],
        default="inception",
        help="as in augment.crop",
    )
    data.add_argument("--rounds", type=int, default=5, help="each figure is a median over them")

    order = commands.add_parser(
        "order",
        help="index, start-up, seek, memory and shuffle of a data set of any size, and proof of its order",
        epilog="example: python tools/bench.py order --samples 303000000 --shards 30000 --world 1024",
    )
    order.add_argument("--samples", type=int, default=303_000_000, help="of the synthetic data set")
    order.add_argument("--shards", type=int, default=30_000, help="of the synthetic data set")
    order.add_argument("--world", type=int, default=1024, help="number of ranks")
    order.add_argument("--global-batch", type=int, default=4096, help="images per step of all ranks")
    order.add_argument("--sample-bytes", type=int, default=110_000, help="size of a stored JPEG")
    order.add_argument("--workers", type=int, default=8, help="data workers of a rank")
    order.add_argument(
        "--chunk-order", choices=["shuffled", "stratified"], default="shuffled", help="as data.chunk_order"
    )
    order.add_argument("--folder", type=Path, default=Path("data/bench-order"), help="for the data set")

    in_order = commands.add_parser(
        "sorted",
        help="simulate what shards that are sorted by class do to batches, in several orders",
        epilog="example: python tools/bench.py sorted --samples 50000 --classes 10 --global-batch 128",
    )
    in_order.add_argument("--samples", type=int, default=1_281_167, help="of the synthetic data set")
    in_order.add_argument(
        "--classes", type=int, default=1000, help="of the synthetic data set, equally large"
    )
    in_order.add_argument("--global-batch", type=int, default=1024, help="images per step of all ranks")

    checkpoint = commands.add_parser(
        "checkpoint",
        help="save, load and export, beside raw writes and DeepSpeed's own checkpoints",
        epilog="example: python tools/bench.py checkpoint --variant B/16 --ranks 2 --folder /mnt/disk",
    )
    checkpoint.add_argument("--variant", default="B/16", help="of the model, NAME/PATCH")
    checkpoint.add_argument("--ranks", type=int, default=2, help="processes that save, one per GPU if any")
    checkpoint.add_argument("--rounds", type=int, default=5, help="each figure is a median over them")
    checkpoint.add_argument("--folder", default="", help="on the disk to measure; default: a temporary one")
    checkpoint.add_argument(
        "--no-deepspeed", dest="deepspeed", action="store_false", help="do not measure DeepSpeed's own"
    )

    step = commands.add_parser(
        "step",
        help="images per second, MFU and memory of a training step, beside plain PyTorch and timm",
        epilog="example: python tools/bench.py step --variant H/14 --batch 128",
    )
    step.add_argument("config", nargs="*", metavar="CONFIG.toml", help="measure its model and precision")
    step.add_argument("--variant", help="without a config: the model, NAME/PATCH; default: B/16")
    step.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: the config's, or bf16")
    step.add_argument("--batch", type=int, help="images of a step; default: 64, and in the suite more")
    for name, choices in STEP_CASES.items():
        step.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, help="the rows to measure"
        )
    step.add_argument("--rounds", type=int, help="each figure is a median over them; default: 5")
    step.add_argument("--steps", type=int, help="of a round; default: 5")
    step.add_argument(
        "--suite",
        type=Path,
        metavar="RESULTS.json",
        help="instead: the paper's models and an end-to-end run, into this file; continues where it stopped, "
        "and a new name measures all again",
    )
    step.add_argument("--index", help="of photographs, for the end-to-end run of the suite")
    step.add_argument("--variants", nargs="*", help=f"of the suite; default: {' '.join(SUITE_VARIANTS)}")

    inference = commands.add_parser(
        "inference",
        help="the paper's Figure 12: images per second of a forward pass and the largest batch, by size",
        epilog="example: python tools/bench.py inference --models B/16 R50x1 --sizes 128 224\n\n"
        "The row of each model and size is written to --json as soon as it is measured, and is not measured\n"
        "again. The largest batch is found on a GPU alone: a CPU would swap.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inference.add_argument(
        "config", nargs="*", metavar="CONFIG.toml", help="measure its model alone, or with --models"
    )
    inference.add_argument(
        "--models",
        nargs="+",
        help=f"variants, R50+B/16 and Axial-B/16 too; default: {' '.join(FIGURE12_MODELS)}",
    )
    inference.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=FIGURE12_SIZES,
        help="of square images, in pixels; a ViT rounds them down to whole patches; default: "
        + " ".join(map(str, FIGURE12_SIZES)),
    )
    inference.add_argument(
        "--max-batch",
        type=int,
        help="time no larger batch; two doublings without gain end the timing before; default: "
        f"{MAX_BATCH_CPU}, and on a GPU {MAX_BATCH_GPU:,}",
    )
    inference.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], help="default: fp32, and on a GPU bf16"
    )
    inference.add_argument("--rounds", type=int, default=5, help="each figure is a median over them")
    inference.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="also draw them, with all that is in --json; needs: bash tools/setup.sh plots",
    )

    scale = commands.add_parser(
        "scale",
        help="what checkpoints cost on thousands of ranks: manifest, reads, sockets; none is started",
        epilog="example: python tools/bench.py scale --ranks 1024,4096 --variant H/14 --zero 1,3",
    )
    scale.add_argument("--ranks", type=_integers, default=(1024, 4096), help="one or more numbers of ranks")
    scale.add_argument("--zero", type=_integers, default=(1, 3), help="one or more ZeRO stages")
    scale.add_argument("--variant", default="H/14", help="of the model, NAME/PATCH")
    for command in (data, order, in_order, checkpoint, step, inference, scale):
        command.add_argument("--json", type=Path, metavar="OUT.json", help="also write the results there")
    return parser.parse_args(argv)


def bench_data(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale.bench.data import DataBench, run

    return run(_config(DataBench, arguments), Progress())


def bench_order(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale.bench.order import OrderBench, run

    return run(_config(OrderBench, arguments), Progress())


def bench_sorted(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale.bench.sorted import SortedBench, run

    return run(_config(SortedBench, arguments), Progress())


def bench_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale.bench.checkpoint import CheckpointBench, run

    return run(_config(CheckpointBench, arguments), Progress())


def bench_inference(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from vitscale import config as configs
    from vitscale.bench.figures import draw_inference
    from vitscale.bench.inference import InferenceBench, model_of, run
    from vitscale.inspection.figures import new_figure, save
    from vitscale.system import atomic
    from vitscale.train_config import TrainConfig

    if arguments.plot:
        atomic.check_writable(arguments.plot, ".png")
    figure = new_figure(11.0, 4.6) if arguments.plot else None
    names = arguments.models or ([] if arguments.config else FIGURE12_MODELS)
    models = {name.replace("ViT-", ""): model_of(name) for name in names}
    if arguments.config:
        paths, overrides = configs.divided(arguments.config)
        loaded = configs.load(TrainConfig, paths, overrides)
        models[Path(paths[-1]).stem if paths else loaded.model.title] = loaded.model
    precision, max_batch = ("bf16", MAX_BATCH_GPU) if torch.cuda.is_available() else ("fp32", MAX_BATCH_CPU)
    bench = InferenceBench(
        models=models,
        sizes=arguments.sizes,
        precision=arguments.precision or precision,
        max_batch=max_batch if arguments.max_batch is None else arguments.max_batch,
        rounds=arguments.rounds,
    )
    results = run(bench, arguments.json, lambda done: write(arguments, done), Progress())
    if figure:
        draw_inference(figure, results)
        save(figure, arguments.plot)
    return results


def bench_scale(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale.bench.scale import ScaleBench, run

    return run(_config(ScaleBench, arguments), Progress())


def _config(bench: type[T], arguments: argparse.Namespace) -> T:
    """The settings of a bench: each of its fields has an option of the same name."""
    return bench(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(bench)})


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, like 1,3") from None


def bench_step(arguments: argparse.Namespace) -> dict[str, Any]:
    from vitscale import config as configs
    from vitscale.bench import suite
    from vitscale.bench.step import Case, StepBench, every_case, run
    from vitscale.errors import ConfigError
    from vitscale.models.vit_config import ViTConfig
    from vitscale.train_config import TrainConfig

    if arguments.batch is not None:
        configs.positive("", **{"--batch": arguments.batch})
    given = {name: value for name in STEP_SETTINGS if (value := getattr(arguments, name)) is not None}

    def wanted(case: Case) -> bool:
        mode = "compiled" if case.compile else "eager"
        return (
            case.loop in arguments.loops
            and mode in arguments.modes
            and case.checkpointing in arguments.policies
        )

    if arguments.suite:
        if refused := [*arguments.config, *(f"--{name}" for name in given)]:
            raise ConfigError(
                f"--suite does not take {', '.join(refused)}: it measures --variants in "
                f"{StepBench.precision}, {StepBench.rounds} rounds of {StepBench.steps} steps; "
                "leave these out, or --suite"
            )
        return suite.run(
            arguments.suite,
            arguments.index or "",
            SUITE_VARIANTS if arguments.variants is None else arguments.variants,
            arguments.batch or 0,
            wanted,
            Progress(),
        )
    if refused := [f"--{name}" for name in SUITE_SETTINGS if getattr(arguments, name) is not None]:
        raise ConfigError(
            f"{' and '.join(refused)} would be ignored: without --suite, one model is measured; "
            "add --suite RESULTS.json, or name a single model by --variant"
        )
    if arguments.config:
        loaded = configs.load(TrainConfig, *configs.divided(arguments.config))
        model, precision = loaded.model, loaded.precision
    else:
        model, precision = ViTConfig(variant=given.get("variant", ViTConfig.variant)), "bf16"
    bench = StepBench(
        model=model,
        batch=suite.DEFAULT_BATCH if arguments.batch is None else arguments.batch,
        precision=given.get("precision", precision),
        cases=tuple(filter(wanted, every_case(model))),
        rounds=given.get("rounds", StepBench.rounds),
        steps=given.get("steps", StepBench.steps),
    )
    return run(bench, Progress())


class Progress:
    """Shows the stage of a measurement on stderr: on one line of a terminal, else at times."""

    def __init__(self) -> None:
        self.shown_at = -math.inf

    def __call__(self, stage: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{stage} ...", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self.shown_at + SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            print(f"{stage} ...", file=sys.stderr, flush=True)


def print_table(results: dict[str, Any], indent: str = "") -> None:
    if sys.stderr.isatty() and not indent:
        print("\r\033[K", end="", file=sys.stderr)
    for name, value in results.items():
        if name == "config":
            continue  # for tools/plan.py, which reads it in the file
        if isinstance(value, dict):
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:<{46 - len(indent)}}{_shown(value):>16}")


def _shown(value: float | str) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


COMMANDS = {
    "data": bench_data,
    "order": bench_order,
    "sorted": bench_sorted,
    "checkpoint": bench_checkpoint,
    "step": bench_step,
    "inference": bench_inference,
    "scale": bench_scale,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
