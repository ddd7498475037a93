"""Where a forked rank can be made to act: at its batches, steps, calls and saves."""

import itertools
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from vitscale.checkpoint.save import THREAD_NAME
from vitscale.step import train_step

# Calls into C by which a save changes files or folders, or waits for another rank.
EFFECTS = {
    "open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "allreduce",
    "broadcast", "gather",
}  # fmt: skip


def rank() -> int:
    return int(os.environ["RANK"])


def at_batch(number: int, act: Callable[[], object]) -> None:
    """Call act() as this rank begins its n-th batch (from 1)."""
    at_batches(lambda batch: act() if batch == number else None)


def at_batches(act: Callable[[int], object]) -> None:
    """Call act(n) as this rank begins its n-th batch (from 1)."""
    at_calls(train_step, act)


def at_calls(function: Callable[..., Any], act: Callable[[int], object]) -> None:
    """Call act(n) as this rank begins its n-th call of a function (from 1)."""
    calls = itertools.count(1)
    at_frames(function, lambda _: act(next(calls)))


def at_steps(act: Callable[[int], object]) -> None:
    """Call act(step) as this rank begins to train that step of the run (from 1)."""
    at_frames(train_step, lambda frame: act(frame.f_locals["step"]))


def at_frames(function: Callable[..., Any], act: Callable[[FrameType], object]) -> None:
    """Call act(frame) as this rank begins a call of a function, after what others call then."""
    earlier = sys.getprofile()

    def profile(frame: FrameType, event: str, value: Any) -> None:
        if earlier:
            earlier(frame, event, value)
        if event == "call" and frame.f_code is function.__code__:
            act(frame)

    sys.setprofile(profile)


def at_effects(act: Callable[[int, int, str], None]) -> None:
    """Call act(save, effect, name) before every effect of the thread that writes checkpoints.

    The interpreter's profiler sees every call into C, so that nothing under test is replaced.
    """
    num_effects: dict[threading.Thread, int] = {}  # of every save so far: each has a thread of its own

    def profile(_: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in EFFECTS:
            thread = threading.current_thread()
            if thread.name == THREAD_NAME:
                num_effects.setdefault(thread, 0)
                act(len(num_effects) - 1, num_effects[thread], called.__name__)
                num_effects[thread] += 1

    threading.setprofile(profile)
