#!/usr/bin/env python3
"""Train or fine-tune; the same command again resumes. A launcher runs this on every device."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python launch/train.py configs/demo/shapes.toml                                     one process
  torchrun --nproc_per_node 2 launch/train.py configs/demo/shapes.toml optim.lr=5e-4  two, GPUs or not
  deepspeed --num_gpus 8 launch/train.py configs/pretrain/vit_b16_in21k.toml          eight GPUs
  python launch/train.py configs/demo/shapes.toml --dry-run --world-size 64           show what would run

exit status: 0 done; 1 a process was lost, a store did not answer, or a bug: start it again; 2 something that
you can fix, which one line names; 75 stopped after a clean save: by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, to be
started again, or by RUN/stop; 130 ended by a second Ctrl-C, or by one before training began, without a save.
Launchers return others; whatever they return, RUN/status.json says how it ended"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG.toml",
        help="TOML files, later ones win; section.key=value wins over all",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: for so many processes, not those here"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(
            f"there is no {unknown[0]}: settings are section.key=value words, those of DeepSpeed in "
            "[engine], and the same command resumes"
        )
    if arguments.world_size is not None and (not arguments.dry_run or arguments.world_size < 1):
        parser.error("--world-size is a number from 1, for --dry-run only: to train, a launcher sets it")
    # Torch is imported after the arguments have been checked, so that --help is instant.
    from vitscale import command

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return command.run(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from vitscale import command

    with command.importing():
        import psutil

        from vitscale import config, distributed
        from vitscale.dry_run import describe
        from vitscale.train import train
        from vitscale.train_config import TrainConfig

    paths, overrides = config.divided(arguments.configs)
    if not arguments.dry_run:
        distributed.initialize()
        loaded = distributed.together(lambda: config.load(TrainConfig, paths, overrides))
        return train(loaded, psutil.Process().create_time())
    if distributed.launched_rank() == 0:
        world_size = arguments.world_size or distributed.launched_world_size()
        print(describe(config.load(TrainConfig, paths, overrides), world_size))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    status = 1
    try:
        status = main()
    except SystemExit as end:  # of argparse
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # leave() prints nothing: a bug of ours would end without a word
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        from vitscale import command

        command.leave(status)
