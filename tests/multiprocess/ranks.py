"""What the ranks of the tests do; tests start these functions in real processes (multiprocess.zygote)."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from launch.train import main
from vitscale.checkpoint.saver import THREAD_NAME

# Calls into C with which a save changes the world, or waits for another rank.
EFFECTS = {
    "open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "allgather",
}  # fmt: skip


def train(config: str, *overrides: str) -> int:
    """A run, as launch/train.py makes it."""
    return main([config, *overrides])


def train_apart(config: str, run_dir: str, *overrides: str) -> int:
    """A run whose ranks share no disk: each has a run directory of its own."""
    return train(config, f"run_dir={run_dir}-{os.environ['RANK']}", *overrides)


def train_a_little(config: str, *overrides: str) -> int:
    """A run that is asked to stop after its seventh batch, as by a scheduler."""
    batches = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal batches
        if event == "call" and frame.f_code.co_name == "train_step":
            batches += 1
            if batches == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    sys.setprofile(count)
    return train(config, *overrides)


def train_with_file_limit(config: str, rank: str, num_bytes: str, *overrides: str) -> int:
    """A run in which one rank can write no file longer than `num_bytes`, as under a quota."""
    if os.environ["RANK"] == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), int(num_bytes)))
    return train(config, *overrides)


def train_until_killed(config: str, rank: str, save: str, effect: str, *overrides: str) -> int:
    """A run in which one rank kills itself just before the n-th effect of its n-th save (from 0)."""
    if os.environ["RANK"] == rank:
        _at_effects(_killer(int(save), int(effect)))
    return train(config, *overrides)


def train_recorded(config: str, file: str, *overrides: str) -> int:
    """A run that writes down the effects of its saves: a line for every save, names between blanks."""
    saves: list[list[str]] = []

    def record(number: int, _: int, name: str) -> None:
        saves.extend([] for _ in range(number + 1 - len(saves)))
        saves[number].append(name)

    _at_effects(record)
    status = train(config, *overrides)
    with open(f"{file}-{os.environ['RANK']}", "w", encoding="utf-8") as out:
        out.writelines(" ".join(names) + "\n" for names in saves)
    return status


def _killer(save: int, effect: int) -> Callable[[int, int, str], None]:
    def at(number: int, count: int, name: str) -> None:
        if (number, count) == (save, effect):
            print(f"killed before {name}, effect {count} of save {number}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def _at_effects(act: Callable[[int, int, str], None]) -> None:
    """Call act(save, effect, name) before every effect of the thread that writes checkpoints.

    The interpreter's profiler sees every call into C, so nothing of what is tested is replaced.
    """
    counts: dict[threading.Thread, int] = {}

    def profile(_: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in EFFECTS:
            thread = threading.current_thread()
            if thread.name == THREAD_NAME:
                counts[thread] = counts.get(thread, -1) + 1
                act(len(counts) - 1, counts[thread], called.__name__)

    threading.setprofile(profile)
