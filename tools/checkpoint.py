#!/usr/bin/env python3
"""Look at checkpoints, verify and compare them; exchange weights with other libraries, and average them."""

import argparse
import dataclasses
import datetime
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/checkpoint.py list runs/shapes
  python tools/checkpoint.py show runs/shapes
  python tools/checkpoint.py verify runs/shapes/checkpoints/step-000000400
  python tools/checkpoint.py diff runs/shapes runs/shapes/checkpoints/step-000000200
  python tools/checkpoint.py reshard runs/shapes shipped/step-000000400 --world 1
  python tools/checkpoint.py export runs/shapes exports/shapes.safetensors --format safetensors
  python tools/checkpoint.py export runs/shapes exports/timm --format timm --dtype bf16
  python tools/checkpoint.py import ViT-B_16.npz imported/vit_b16 --format npz
  python tools/checkpoint.py average runs/a runs/b averaged.safetensors"""

CKPT = "a run directory (its newest good checkpoint), a step directory, or an export"
DIFF = """Compare two checkpoints or exports tensor by tensor. Exit status: 0 if they hold the same weights
at the same point of the same experiment, 1 if not, 2 if one cannot be read. run_dir, [engine], [log],
[checkpoint], [evals] and the ranks that wrote them may differ. "relative" is |A-B| / max(|A|, |B|), in L2
norms."""

FORMATS = ["safetensors", "timm", "transformers", "npz"]
PIXELS = "how its images were normalised: imagenet (DINO, DeiT) goes into the patch embedding; half is ours"
DIALECT = "names in an .npz file: original = Google's released files, linen = its code since, big_vision"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_views(commands)
    _add_exchange(commands)
    arguments = _parse(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)

    from vitscale.checkpoint.format import CheckpointError
    from vitscale.config import ConfigError

    try:
        return COMMANDS[arguments.command](arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left half written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, head or less, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or error}: {error.strerror}; mend the path or its permissions",
            file=sys.stderr,
        )
        return 2


def _add_views(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands list, show, verify, diff and reshard."""
    add = commands.add_parser
    listing = add("list", help="the checkpoints of a run: step, metrics, size, and whether each is whole")
    listing.add_argument("run", metavar="RUN", help="a run directory, or its URL in a store")
    listing.add_argument("--fast", action="store_true", help="compare sizes only; reads no tensor")
    show = add("show", help="what a checkpoint holds: facts, tensors in numbers, config")
    show.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    show.add_argument("--config", action="store_true", help="the config alone, as TOML")
    add("verify", help="re-read every file and compare checksums").add_argument(
        "checkpoint", metavar="CKPT", help=CKPT
    )
    diff = add("diff", help="which tensors of two checkpoints differ, and by how much", description=DIFF)
    diff.add_argument("a", metavar="CKPT", help=CKPT)
    diff.add_argument("b", metavar="CKPT", help=CKPT)
    diff.add_argument(
        "--states", action="store_true", help="also compare the optimizer's state and averages of the weights"
    )
    for command in (listing, show, diff):
        command.add_argument("--json", action="store_true", help="print JSON")
    reshard = add(
        "reshard", help="the same checkpoint in N files; nothing needs it: any world reads any other's"
    )
    reshard.add_argument("checkpoint", metavar="CKPT", help="a run directory, or a step directory")
    reshard.add_argument("out", metavar="OUT", help="the step directory to make")
    reshard.add_argument(
        "--world", metavar="N", type=int, required=True, help="number of ranks to cut it for"
    )


def _add_exchange(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands export, import and average."""
    export = commands.add_parser("export", help="the weights for another library, or with the config inside")
    export.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    export.add_argument("out", metavar="OUT", help="a folder, FILE.safetensors, or for npz FILE.npz")
    export.add_argument("--format", choices=FORMATS, default="safetensors")
    export.add_argument(
        "--dialect", choices=["original", "linen", "big_vision"], default="original", help=DIALECT
    )
    export.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    export.add_argument(
        "--shard-mb", metavar="N", type=int, default=0, help="files of at most N x 10^6 bytes; 0 = one file"
    )
    importing = commands.add_parser("import", help="an export, which any command takes, from other weights")
    importing.add_argument("file", metavar="FILE", help="FILE.npz, FILE.safetensors, or the folder of one")
    importing.add_argument("out", metavar="OUT", help="a folder, or FILE.safetensors")
    importing.add_argument("--format", choices=FORMATS, required=True)
    importing.add_argument("--pixels", choices=["half", "imagenet"], default="half", help=PIXELS)
    importing.add_argument(
        "overrides",
        metavar="model.KEY=VALUE",
        nargs="*",
        help="what the file does not say: model.num_heads=3",
    )
    average = commands.add_parser("average", help="the mean of the weights of several checkpoints, an export")
    average.add_argument("checkpoints", metavar="CKPT", nargs="+", help=CKPT)
    average.add_argument("out", metavar="OUT", help="a folder, or FILE.safetensors")
    for command in (export, average):
        command.add_argument(
            "--ema", action="store_true", help="their average over training (optim.ema_decay)"
        )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As parse_args, with overrides before or after the options, which argparse does not do by itself."""
    arguments, late = parser.parse_known_args(argv)
    if late and (arguments.command != "import" or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        arguments.overrides += late
    return arguments


def list_run(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.report import listing, show

    found = listing.list_run(arguments.run, checksums=not arguments.fast)
    print(show.to_json(dataclasses.asdict(found)) if arguments.json else listing.render(found, _now()))
    return 0


def show_checkpoint(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.report import show

    opened = show.open_checkpoint(arguments.checkpoint)
    if arguments.config:
        print(show.to_json(opened.config) if arguments.json else show.render_config(opened).rstrip())
        return 0
    tensors = show.measure(opened)
    if arguments.json:
        print(show.to_json(show.values_of(opened, tensors)))
    else:
        print(show.render(opened, tensors, _now()))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.report import show

    print(show.render_verified(show.open_checkpoint(arguments.checkpoint)))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.report import compare, show

    a, b = (show.open_checkpoint(path) for path in (arguments.a, arguments.b))
    found = compare.compare(a, b, all_states=arguments.states)
    print(show.to_json(dataclasses.asdict(found)) if arguments.json else compare.render(found))
    return 0 if found.equal else 1


def reshard(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.reshard import reshard

    print(reshard(arguments.checkpoint, arguments.out, arguments.world))
    return 0


def export(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.foreign.convert import export_model

    out = export_model(
        arguments.checkpoint,
        arguments.out,
        format=arguments.format,
        dialect=arguments.dialect,
        dtype=arguments.dtype,
        shard_mb=arguments.shard_mb,
        state="ema" if arguments.ema else "fp32",
    )
    print(out)
    return 0


def import_weights(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.foreign.convert import import_model

    out = import_model(
        arguments.file,
        arguments.out,
        format=arguments.format,
        overrides=arguments.overrides,
        pixels=arguments.pixels,
    )
    print(out)
    return 0


def average(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.average import average

    print(average(arguments.checkpoints, arguments.out, state="ema" if arguments.ema else "fp32"))
    return 0


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


COMMANDS = {
    "list": list_run,
    "show": show_checkpoint,
    "verify": verify,
    "diff": diff,
    "reshard": reshard,
    "export": export,
    "import": import_weights,
    "average": average,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
