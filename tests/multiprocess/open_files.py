"""What the ranks of test_open_files.py do."""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

from vitscale import config as configs
from vitscale import distributed, start
from vitscale import train as training
from vitscale.errors import UserError
from vitscale.guard.watch import Watch
from vitscale.guard.watchdog import Watchdog
from vitscale.job import prepare
from vitscale.metrics.goodput import Ledger
from vitscale.progress import Phases
from vitscale.train_config import TrainConfig


def join(soft: int, hard: int, result: Path) -> None:
    """Join a job under limits of open files; RESULT-RANK gets what is said, and new ones."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        distributed.initialize()
        distributed.barrier()  # the store of the other rank, which may still join, ends with this one
        said = ["joined", False]
    except UserError as error:
        said = [str(error), error.shared]
    out = Path(f"{result}-{distributed.launched_rank()}")
    out.write_text(json.dumps([*said, *resource.getrlimit(resource.RLIMIT_NOFILE)]))


def watch(result: Path) -> None:
    """Get a SIGTERM while more than 1,024 files are open; RESULT gets the watch's reason."""
    distributed.initialize()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    assert max(files) >= 1024
    with Watch(lambda _: 1) as watching:
        os.kill(os.getpid(), signal.SIGTERM)
        while not watching.asked and watching._thread.is_alive():
            watching._thread.join(0.01)
        result.write_text(watching.reason)


def count(config: Path, overrides: Sequence[str], result: Path) -> None:
    """Train to the end; RESULT-RANK gets how many files are open then, and how many sockets."""
    distributed.initialize()
    loaded = configs.load(TrainConfig, [config], overrides)
    job = prepare(loaded, distributed.world_size())
    names = []
    with (
        Watch(lambda _: 1) as watching,
        Watchdog(loaded.guard.limit_seconds(), watching, lambda *_: 1),
        start.started(job, {}) as run,
    ):
        training.loop(run, watching, Phases(), Ledger(loaded.run_dir, 0.0, writes=False))
        distributed.barrier()
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists them
                names.append(os.readlink(link))
        distributed.barrier()  # a rank that leaves closes its connections to the others
    sockets = sum(name.startswith("socket:") for name in names)
    Path(f"{result}-{distributed.rank()}").write_text(json.dumps([len(names), sockets]))
