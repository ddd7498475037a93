#!/usr/bin/env python3
"""List, show, verify, compare and cool down checkpoints; export, import and average weights."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from vitscale.redaction import redact

EXAMPLE = """examples:
  python tools/checkpoint.py list runs/shapes
  python tools/checkpoint.py show runs/shapes
  python tools/checkpoint.py verify runs/shapes/checkpoints/step-000000400
  python tools/checkpoint.py diff runs/shapes runs/shapes/checkpoints/step-000000200
  python tools/checkpoint.py reshard runs/shapes shipped/step-000000400 --world 1
  python tools/checkpoint.py cooldown runs/shapes runs/shapes-done --steps 100
  python tools/checkpoint.py export runs/shapes exports/shapes.safetensors --format safetensors
  python tools/checkpoint.py export runs/shapes exports/timm --format timm --dtype bf16
  python tools/checkpoint.py import ViT-B_16.npz imported/vit_b16 --format npz
  python tools/checkpoint.py average runs/a runs/b averaged.safetensors"""

CKPT = "a run directory (its newest good checkpoint), a step directory, or an export"
DIFF = """Compare two checkpoints or exports tensor by tensor. Exit status: 0 if they hold the same weights
at the same point of the same experiment, 1 if not, 2 if one of them cannot be read. run_dir, [engine],
[log], [checkpoint], [evals], [expect], [finetune], [guard] and the ranks that wrote them may differ.
"relative" is |A-B| / max(|A|, |B|) in L2 norms."""

FORMATS = ["safetensors", "timm", "transformers", "npz"]
PIXELS = (
    "how its images were normalised, where no file beside it says so: half = as ours; imagenet (DINO, DeiT) "
    "= the difference goes into the patch embedding"
)
DIALECT = "names in an .npz file: original = Google's released files, linen = its later code, big_vision"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_views(commands)
    _add_exchange(commands)
    arguments = _parse(parser, argv)

    from vitscale import command

    return command.run(lambda: COMMANDS[arguments.command](arguments))


def _add_views(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands list, show, verify, diff, reshard and cooldown."""
    add = commands.add_parser
    listing = add("list", help="the checkpoints of a run: step, metrics, size, and whether each is intact")
    listing.add_argument("run", metavar="RUN", help="a run directory, or its URL in a store")
    listing.add_argument(
        "--fast", action="store_true", help="compare only the sizes of the files, and read no tensor"
    )
    show = add("show", help="what a checkpoint holds: facts, tensors in numbers, config")
    show.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    show.add_argument("--config", action="store_true", help="only the config, as TOML")
    add("verify", help="read every file again and compare checksums").add_argument(
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
        "reshard", help="the same checkpoint in N files, for shipping: any world size reads any checkpoint"
    )
    reshard.add_argument("checkpoint", metavar="CKPT", help="a run directory, or a step directory")
    reshard.add_argument("out", metavar="OUT", help="the step directory to write")
    reshard.add_argument("--world", metavar="N", type=int, required=True, help="the number of files")
    cooldown = add(
        "cooldown",
        help="write RUN/config.toml: a run that continues a checkpoint while its learning rate falls to 0",
    )
    cooldown.add_argument("checkpoint", metavar="CKPT", help="a run directory, or a step directory")
    cooldown.add_argument("run", metavar="RUN", help="the run directory to write")
    cooldown.add_argument(
        "--steps", metavar="N", type=int, required=True, help="a tenth to a fifth of the run's is usual"
    )


def _add_exchange(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands export, import and average."""
    export = commands.add_parser(
        "export", help="write the weights for another library, or for vitscale with the config inside"
    )
    export.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    export.add_argument("out", metavar="OUT", help="a folder, FILE.safetensors, FILE.npz or FILE.onnx")
    export.add_argument(
        "--format", choices=[*FORMATS, "onnx"], help="default: as the file's name ends, else safetensors"
    )
    export.add_argument(
        "--dialect", choices=["original", "linen", "big_vision"], default="original", help=DIALECT
    )
    export.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    export.add_argument(
        "--shard-mb", metavar="N", type=int, default=0, help="files of at most N x 10^6 bytes; 0 = one file"
    )
    importing = commands.add_parser("import", help="make an export from another library's weights")
    importing.add_argument(
        "file", metavar="FILE", help="FILE.npz, FILE.safetensors, or a folder of safetensors"
    )
    importing.add_argument("out", metavar="OUT", help="a folder, or FILE.safetensors")
    importing.add_argument("--format", choices=FORMATS, required=True)
    importing.add_argument("--pixels", choices=["half", "imagenet"], help=PIXELS)
    importing.add_argument(
        "overrides",
        metavar="model.KEY=VALUE",
        nargs="*",
        help="what the file does not say, for example model.num_heads=3",
    )
    average = commands.add_parser(
        "average", help="make an export of the mean of several checkpoints' weights"
    )
    average.add_argument("checkpoints", metavar="CKPT", nargs="+", help=CKPT)
    average.add_argument("out", metavar="OUT", help="a folder, or FILE.safetensors")
    for command in (export, average):
        command.add_argument(
            "--ema", action="store_true", help="take their average over training (optim.ema_decay)"
        )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As parse_args, but overrides may follow the options too, which argparse would refuse."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "import" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def list_run(arguments: argparse.Namespace) -> int:
    from vitscale.report import listing
    from vitscale.report.text import json_values, to_json

    checkpoints = listing.list_run(arguments.run, checksums=not arguments.fast)
    if arguments.json:
        print(to_json(json_values(checkpoints)))
    else:
        print(redact(listing.render(checkpoints, _now())))
    listing.check_newest(checkpoints)
    return 0


def show_checkpoint(arguments: argparse.Namespace) -> int:
    from vitscale.report import show
    from vitscale.report.contents import open_contents
    from vitscale.report.text import to_json

    contents = open_contents(arguments.checkpoint)
    if arguments.config:
        print(to_json(contents.config) if arguments.json else show.render_config(contents).rstrip())
        return 0
    tensors = show.measure(contents)
    if arguments.json:
        print(to_json(show.values_of(contents, tensors)))
    else:
        print(redact(show.render(contents, tensors, _now())))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.report.contents import open_contents
    from vitscale.report.show import check_newest, render_verified

    contents = open_contents(arguments.checkpoint)
    print(redact(render_verified(contents)))
    check_newest(contents)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    from vitscale.report import compare
    from vitscale.report.contents import open_contents
    from vitscale.report.text import json_values, to_json

    a, b = open_contents(arguments.a), open_contents(arguments.b)
    comparison = compare.compare(a, b, all_slots=arguments.states)
    print(to_json(json_values(comparison)) if arguments.json else redact(compare.render(comparison)))
    return 0 if comparison.equal else 1


def reshard(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.reshard import reshard

    print(reshard(arguments.checkpoint, arguments.out, arguments.world))
    return 0


def cooldown(arguments: argparse.Namespace) -> int:
    from vitscale.cooldown import write_cooldown

    path = write_cooldown(arguments.checkpoint, arguments.run, arguments.steps)
    print(f"{path}\nstart it as you started the trunk, with this config: python launch/train.py {path}")
    print(
        "until it has saved, it needs the checkpoint that [init] names: where the trunk goes on, let "
        "checkpoint.keep_every_steps keep that, or name a copy of it (tools/checkpoint.py reshard)"
    )
    return 0


def export(arguments: argparse.Namespace) -> int:
    from vitscale.weights.foreign.convert import export_model

    out = export_model(
        arguments.checkpoint,
        arguments.out,
        format=arguments.format,
        dialect=arguments.dialect,
        dtype=arguments.dtype,
        shard_mb=arguments.shard_mb,
        slot="ema" if arguments.ema else "fp32",
    )
    print(out)
    return 0


def import_weights(arguments: argparse.Namespace) -> int:
    from vitscale.weights.foreign.convert import import_model

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
    from vitscale.weights.average import average

    print(average(arguments.checkpoints, arguments.out, slot="ema" if arguments.ema else "fp32"))
    return 0


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


COMMANDS = {
    "list": list_run,
    "show": show_checkpoint,
    "verify": verify,
    "diff": diff,
    "reshard": reshard,
    "cooldown": cooldown,
    "export": export,
    "import": import_weights,
    "average": average,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
