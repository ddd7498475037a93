"""A run of forked ranks, and what happens to them, as values that a test can print."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from multiprocess.hooks import at_batch, at_batches, at_calls, at_effects, at_frames, rank
from weights.foreign_models import import_timm

from launch.train import main
from vitscale.checkpoint import snapshot
from vitscale.checkpoint.save import Saver
from vitscale.engine import setup
from vitscale.engine.engine import Engine
from vitscale.evals.classify import ClassifyTask
from vitscale.evals.predictions import Predictions
from vitscale.guard import ending, watch, watchdog
from vitscale.guard.ending import Ending
from vitscale.stores import attempts


class Event(Protocol):
    """What happens to a run; every rank arms it before it starts."""

    def arm(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL of one rank just before an effect of a save, both counted from 0 per start."""

    rank: int
    save: int
    effect: int

    def arm(self) -> None:
        if rank() == self.rank:
            at_effects(self._kill)

    def _kill(self, save: int, effect: int, name: str) -> None:
        if (save, effect) == (self.save, self.effect):
            print(f"{self}: killed before {name}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class KillAll:
    """SIGKILL of all ranks and data workers as one rank begins its n-th batch (from 1)."""

    batch: int

    def arm(self) -> None:
        at_batch(self.batch, lambda: os.killpg(0, signal.SIGKILL))


@dataclasses.dataclass(frozen=True)
class Stop:
    """SIGTERM to every rank as it begins its n-th batch (from 1), as a scheduler sends it."""

    batch: int = 7

    def arm(self) -> None:
        at_batch(self.batch, lambda: os.kill(os.getpid(), signal.SIGTERM))


@dataclasses.dataclass(frozen=True)
class StopInEvaluation:
    """SIGTERM to one rank as it scores its n-th batch of evaluations (from 1)."""

    rank: int
    batch: int

    def arm(self) -> None:
        if rank() == self.rank:
            at_calls(Predictions.of, lambda n: n == self.batch and os.kill(os.getpid(), signal.SIGTERM))


@dataclasses.dataclass(frozen=True)
class KillInEvaluation:
    """SIGKILL of all ranks as rank 0 scores its n-th batch of evaluations (from 1)."""

    batch: int

    def arm(self) -> None:
        if rank() == 0:
            at_calls(Predictions.of, lambda n: n == self.batch and os.killpg(0, signal.SIGKILL))


@dataclasses.dataclass(frozen=True)
class KillInRetention:
    """SIGKILL of all ranks as rank 0 retains checkpoints for the n-th time (from 1)."""

    time: int

    def arm(self) -> None:
        if rank() == 0:
            at_calls(Saver.retain, lambda n: n == self.time and os.killpg(0, signal.SIGKILL))


@dataclasses.dataclass(frozen=True)
class Fail:
    """A bug of ours on one rank, as it begins its n-th batch (from 1)."""

    rank: int
    batch: int

    def arm(self) -> None:
        if rank() == self.rank:
            at_batch(self.batch, self._fail)

    def _fail(self) -> None:
        raise ZeroDivisionError("a bug")


@dataclasses.dataclass(frozen=True)
class SlowSave:
    """The write of each checkpoint begins a second late; then another event."""

    event: Event

    def arm(self) -> None:
        write = snapshot.write

        def late(*arguments: Any) -> None:
            time.sleep(1)
            write(*arguments)

        snapshot.write = late
        self.event.arm()


@dataclasses.dataclass(frozen=True)
class Sleep:
    """One rank does nothing any more as it begins its n-th batch (from 1)."""

    rank: int
    batch: int

    def arm(self) -> None:
        if rank() == self.rank:
            at_batch(self.batch, self.fall_asleep)

    def fall_asleep(self) -> None:
        time.sleep(1e6)


@dataclasses.dataclass(frozen=True)
class FewAttempts:
    """A store is asked twice, not for a minute and a half."""

    def arm(self) -> None:
        attempts.ATTEMPTS = 2


@dataclasses.dataclass(frozen=True)
class CountOldWeights:
    """A line for each new engine: how many weights of earlier ones live. And an event."""

    event: Event

    def arm(self) -> None:
        old: list[weakref.ref[torch.Tensor]] = []

        def count(frame: FrameType) -> None:
            print(f"old weights: {sum(ref() is not None for ref in old)} of {len(old)}", flush=True)
            old.extend(weakref.ref(param) for param in frame.f_locals["module"].parameters())

        at_frames(Engine.__init__, count)
        self.event.arm()


@dataclasses.dataclass(frozen=True)
class SlowToClose:
    """After another event, one rank needs long to close what it has; watches end it soon."""

    rank: int
    event: Event

    def arm(self) -> None:
        self.event.arm()
        watch.LOOK_SECONDS = watch.GRACE_SECONDS = 0.05
        if rank() == self.rank:
            at_calls(Saver.__exit__, lambda _: time.sleep(5))


@dataclasses.dataclass(frozen=True)
class Suspend:
    """All ranks are suspended for some seconds as one of them begins its n-th batch."""

    rank: int
    batch: int
    seconds: float

    def arm(self) -> None:
        if rank() == self.rank:
            at_batch(self.batch, self._suspend)

    def _suspend(self) -> None:
        wake = ["sh", "-c", f"sleep {self.seconds}; kill -CONT -{os.getpgrp()}"]
        subprocess.Popen(wake, start_new_session=True)
        os.killpg(0, signal.SIGSTOP)
        time.sleep(1)  # the rest of the batch


@dataclasses.dataclass(frozen=True)
class HungSave:
    """A file server no longer answers: one rank as it writes a checkpoint, any as it ends."""

    rank: int

    def arm(self) -> None:
        ending.NOTE_SECONDS = 1.0
        hangs = [Ending._is_first, *[snapshot._write_file] * (rank() == self.rank)]

        def stall(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code in [function.__code__ for function in hangs]:
                time.sleep(1e6)

        threading.setprofile(stall)


@dataclasses.dataclass(frozen=True)
class Throttle:
    """One rank takes some seconds more for every forward pass."""

    rank: int
    seconds: float

    def arm(self) -> None:
        if rank() == self.rank:
            at_calls(Engine.forward, lambda _: time.sleep(self.seconds))


@dataclasses.dataclass(frozen=True)
class Freeze:
    """SIGSTOP to one rank as it begins its n-th batch (from 1); it counts as silent sooner."""

    rank: int
    batch: int

    def arm(self) -> None:
        watchdog.SILENT_SECONDS = 6.0
        if rank() == self.rank:
            at_batch(self.batch, lambda: os.kill(os.getpid(), signal.SIGSTOP))


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What torch raises on every rank whose GPU is full.

    where: "step", the first one; "start", as the model is made; or "evaluate".
    """

    where: str = "step"

    def arm(self) -> None:
        if self.where == "step":
            at_batch(1, self._fail)
        elif self.where == "start":
            setup.allocate = lambda *_: self._fail()
        else:
            ClassifyTask.run = lambda *_: self._fail()  # type: ignore[method-assign]

    def _fail(self) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@dataclasses.dataclass(frozen=True)
class HasTimm:
    """timm can be imported, with torchvision or without it. And then another event."""

    event: Event | None = None

    def arm(self) -> None:
        import_timm()
        if self.event:
            self.event.arm()


@dataclasses.dataclass(frozen=True)
class HasFp16:
    """DeepSpeed trains in fp16, which it refuses on a CPU without instructions for it.

    Torch computes in fp16 there as well, if slowly. events: armed after it.
    """

    events: tuple[Event, ...] = ()

    def arm(self) -> None:
        type(get_accelerator()).is_fp16_supported = lambda accelerator: True
        for event in self.events:
            event.arm()


@dataclasses.dataclass(frozen=True)
class NotFinite:
    """A loss that is not finite on one rank, in these of its batches (from 1)."""

    rank: int
    batches: range

    def arm(self) -> None:
        if rank() != self.rank:
            return
        now, backward = 0, Engine.backward

        def count(batch: int) -> None:
            nonlocal now
            now = batch

        def spoiled(engine: Engine, loss: torch.Tensor) -> None:
            backward(engine, loss * float("nan") if now in self.batches else loss)

        at_batches(count)
        Engine.backward = spoiled  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class FileLimit:
    """One rank can write no file that is longer than `num_bytes`, as under a quota."""

    rank: int
    num_bytes: int

    def arm(self) -> None:
        if rank() == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))


@dataclasses.dataclass(frozen=True)
class Record:
    """Nothing but a note of the effects of every save, in FILE-RANK, as lines "SAVE NAME"."""

    file: Path

    def arm(self) -> None:
        at_effects(self._note)

    def _note(self, save: int, _: int, name: str) -> None:
        with open(f"{self.file}-{rank()}", "a", encoding="utf-8") as out:
            out.write(f"{save} {name}\n")

    def effects(self, rank: int, save: int) -> list[str]:
        """The names of a save's effects on a rank, in their order."""
        lines = [line.split() for line in Path(f"{self.file}-{rank}").read_text().splitlines()]
        return [name for number, name in lines if int(number) == save]


def train(config: Path, overrides: Sequence[str] = (), event: Event | None = None) -> int:
    """A run, as launch/train.py makes it."""
    if event:
        event.arm()
    return main([str(config), *overrides])
