#!/usr/bin/env python3
"""The one program that a launcher runs on every device: train (or fine-tune) a config; the same command again
resumes.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
EXAMPLE = """examples:
  python launch/train.py configs/demo/shapes.toml                                   one process
  deepspeed --num_gpus 8 launch/train.py configs/pretrain/vit_b16_in21k.toml        eight GPUs of this machine
  torchrun --nproc_per_node 2 launch/train.py configs/demo/shapes.toml optim.lr=5e-4
  python launch/train.py configs/demo/shapes.toml --dry-run                         show what would run"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG.toml", help="TOML files (later ones win) and section.key=value"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    overrides = [text for text in arguments.configs if "=" in text]
    paths = [text for text in arguments.configs if "=" not in text]

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    from vitscale import config, distributed
    from vitscale.dry_run import describe
    from vitscale.job import TrainConfig
    from vitscale.train import train

    try:
        settings = config.load(TrainConfig, paths, overrides)
        if arguments.dry_run:
            if rank == 0:
                print(describe(settings, world_size))
            return 0
        return train(settings)
    except ValueError as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the metrics' file system is full or read-only, say
        if error.errno not in USERS_ERRORS:
            raise
        where = error.filename or "writing to the run directory"
        print(f"error: {where}: {error.strerror}; mend that, and the same command goes on", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()


def is_users(error: ValueError) -> bool:
    """Whether the user can mend it: a traceback is for our bugs only."""
    from vitscale.checkpoint.format import CheckpointError
    from vitscale.config import ConfigError
    from vitscale.data.index import DataError

    return isinstance(error, ConfigError | DataError | CheckpointError)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not sys.exit(): about once in a hundred exits a thread of torch's ends with SIGABRT then, all work done.
    os._exit(status)
