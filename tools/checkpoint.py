#!/usr/bin/env python3
"""Look at checkpoints, verify them, and export them to plain safetensors files."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/checkpoint.py list runs/shapes
  python tools/checkpoint.py show runs/shapes
  python tools/checkpoint.py verify runs/shapes/checkpoints/step-000000400
  python tools/checkpoint.py export runs/shapes exports/shapes.safetensors --format safetensors"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    add("list", help="the checkpoints of a run").add_argument("run", metavar="RUN")
    add("show", help="what a checkpoint holds").add_argument("checkpoint", metavar="CKPT")
    add("verify", help="re-read every file and compare checksums").add_argument("checkpoint", metavar="CKPT")
    export = add("export", help="weights as one safetensors file, with the model's configuration in it")
    export.add_argument("checkpoint", metavar="CKPT", help="a run directory, a step directory, or an export")
    export.add_argument("out", metavar="OUT", help="FILE.safetensors, or a folder for model.safetensors")
    export.add_argument("--format", choices=["safetensors"], default="safetensors")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)

    from vitscale.checkpoint.format import CheckpointError
    from vitscale.config import ConfigError

    try:
        return COMMANDS[arguments.command](arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or error}: {error.strerror}; mend the path or its permissions",
            file=sys.stderr,
        )
        return 2


def list_run(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint import store
    from vitscale.checkpoint.format import CheckpointError

    directory = store.directory_of(arguments.run)
    steps = store.steps_on_disk(directory)
    if not steps:
        raise CheckpointError(f"{arguments.run} holds no checkpoints: {directory} has no step-* folders")
    print(f"{'step':>12} {'samples':>16} {'MB':>10} {'ranks':>6} {'ZeRO':>5}  {'saved':<26} state")
    for step in steps:
        try:
            manifest = store.verify(store.step_directory(directory, step))
        except CheckpointError as error:
            print(f"{step:>12,} {'':>16} {'':>10} {'':>6} {'':>5}  {'':<26} DAMAGED: {error}")
            continue
        size, ranks, stage = manifest.num_bytes / 1e6, manifest.world_size, manifest.zero_stage
        print(
            f"{step:>12,} {manifest.samples_seen:>16,} {size:>10,.1f} {ranks:>6} {stage:>5}  "
            f"{manifest.created:<26} verified"
        )
    return 0


def show(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.export import SavedModel, describe

    path, manifest = describe(arguments.checkpoint)
    saved = SavedModel(path)
    print(f"{path}\n")
    for name in (
        "step",
        "samples_seen",
        "epoch",
        "step_in_epoch",
        "precision",
        "optimizer",
        "optimizer_steps",
    ):
        print(f"{name:<18}{getattr(manifest, name)}")
    print(f"{'written by':<18}{manifest.world_size} ranks at ZeRO {manifest.zero_stage}, {manifest.created}")
    print(f"{'versions':<18}{', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    print(f"{'states':<18}{', '.join(manifest.states)}\n")
    width = max(map(len, saved.shapes))
    print(f"{'tensor':<{width}} {'shape':<18} {'norm':>12}")
    for name, shape in saved.shapes.items():
        print(f"{name:<{width}} {'x'.join(map(str, shape)):<18} {saved.tensor(name).norm().item():>12.5g}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.export import describe

    path, manifest = describe(arguments.checkpoint)
    print(
        f"{path}: {len(manifest.files)} files, {len(manifest.tensors)} tensors, {manifest.num_bytes:,} bytes "
        "verified"
    )
    return 0


def export(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.export import export_safetensors

    print(export_safetensors(arguments.checkpoint, arguments.out))
    return 0


COMMANDS = {"list": list_run, "show": show, "verify": verify, "export": export}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
