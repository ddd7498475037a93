"""Random faults for a run: drawn from a seed, done by its ranks, and looked for afterwards.

A fault is bound to a step of the run. It strikes as a rank begins the first step from there on
that the run trains, and each strikes at a step of its own. So none is missed, wherever a start
resumes.
"""

import abc
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from multiprocess.ends import read_status
from multiprocess.hooks import at_steps, rank
from multiprocess.job import Job
from multiprocess.ranks import FileLimit, Kill

from vitscale.checkpoint.save import THREAD_NAME
from vitscale.engine.engine import Engine

FILLER = "filler"  # the file in a run directory that fills its disk
MAX_GAP_STEPS = 9  # from one fault to the next


@dataclasses.dataclass(frozen=True)
class Fault(abc.ABC):
    """What happens to a rank of the run at a step."""

    step: int
    rank: int
    ends: ClassVar[bool] = True  # the start, so that another one follows

    @classmethod
    def draw(cls, rng: random.Random, step: int, rank: int) -> "Fault":
        return cls(step, rank)

    @abc.abstractmethod
    def strike(self, run_dir: Path) -> None:
        """Let it happen, in the process of the rank."""

    @abc.abstractmethod
    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        """Whether the start, whose log the job has, ended as it must after this fault."""


class KillRank(Fault):
    def strike(self, run_dir: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        return statuses[self.rank] == -9 and 0 not in statuses


class KillAll(Fault):
    """All ranks at once, with their data workers."""

    def strike(self, run_dir: Path) -> None:
        os.killpg(0, signal.SIGKILL)

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        return set(statuses) == {-9}


class KillWorker(Fault):
    """SIGKILL of the rank's data worker, as the kernel does for lack of memory."""

    def strike(self, run_dir: Path) -> None:
        (worker,) = multiprocessing.active_children()
        worker.kill()

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        reason = f"a data worker of rank {self.rank} was killed"
        return statuses[self.rank] == 1 and failed(job, reason)


@dataclasses.dataclass(frozen=True)
class KillInSave(Fault):
    """SIGKILL of a rank before an effect of its next save, which runs in the background."""

    effect: int
    NUM_EFFECTS: ClassVar[int] = 100  # each of two ranks has some more

    @classmethod
    def draw(cls, rng: random.Random, step: int, rank: int) -> "KillInSave":
        return cls(step, rank, rng.randrange(cls.NUM_EFFECTS))

    def strike(self, run_dir: Path) -> None:
        Kill(self.rank, save=0, effect=self.effect).arm()

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        return statuses[self.rank] == -9 and 0 not in statuses and ": killed before " in job.output()


@dataclasses.dataclass(frozen=True)
class Preempt(Fault):
    """A signal by which a scheduler asks one rank to stop."""

    signal: signal.Signals

    @classmethod
    def draw(cls, rng: random.Random, step: int, rank: int) -> "Preempt":
        return cls(step, rank, rng.choice([signal.SIGTERM, signal.SIGUSR1]))

    def strike(self, run_dir: Path) -> None:
        os.kill(os.getpid(), self.signal)

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        status = read_status(job)
        reason = f"{self.signal.name} (rank {self.rank})"
        return set(statuses) == {75} and (status["state"], status["reason"]) == ("preempted", reason)


@dataclasses.dataclass(frozen=True)
class FullDisk(Fault):
    """The run's disk is full but for `free_bytes`, which are less than a save.

    If the run directory is no file system of its own, rank 0 can write no long file instead.
    """

    free_bytes: int
    SHORTEST_BYTES: ClassVar[int] = 20_000  # of a file that a rank cannot write; its log is shorter

    @classmethod
    def draw(cls, rng: random.Random, step: int, rank: int) -> "FullDisk":
        return cls(step, 0, rng.randrange(100_000))  # rank 0 deletes old checkpoints

    def strike(self, run_dir: Path) -> None:
        if not run_dir.is_mount():
            FileLimit(self.rank, self.SHORTEST_BYTES + self.free_bytes // 4).arm()
            return
        for thread in threading.enumerate():
            if thread.name == THREAD_NAME:
                thread.join()  # a save under way may free as much as the next one needs
        with open(run_dir / FILLER, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(run_dir).free - self.free_bytes)

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        reason = "No space left on device" if job.run_dir.is_mount() else "File too large"
        told = [line for line in job.output().splitlines() if line.startswith("error: ")]
        is_named = any(f"{job.run_dir}/" in line and reason in line for line in told)
        return 2 in statuses and 0 not in statuses and is_named and told_once(job)


@dataclasses.dataclass(frozen=True)
class Pause(Fault):
    """SIGSTOP of a rank, and SIGCONT a little later: the run waits, and goes on."""

    seconds: float
    ends: ClassVar[bool] = False

    @classmethod
    def draw(cls, rng: random.Random, step: int, rank: int) -> "Pause":
        return cls(step, rank, round(rng.uniform(0.2, 1.5), 1))

    def strike(self, run_dir: Path) -> None:
        began = time.monotonic()
        waker = subprocess.Popen(["sh", "-c", f"sleep {self.seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        waker.wait()
        if time.monotonic() - began >= self.seconds:
            say(f"{self}: continued")

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        return f"{self}: continued" in job.output()


class Freeze(Fault):
    """SIGSTOP of a rank, which the watchdog of the others ends with the job."""

    def strike(self, run_dir: Path) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        ended = statuses[self.rank] == -9 and 1 in statuses and 0 not in statuses
        return ended and failed(job, f"the job hangs: rank {self.rank} (process ")


# In turn; the first five are what five faults are.
KINDS = (KillInSave, Preempt, FullDisk, KillRank, Pause, KillAll, KillWorker)


@dataclasses.dataclass(frozen=True)
class Start:
    """An event of a start of the run: its faults, and losses that are not finite.

    run_dir: of the run.
    faults: at most the last one ends the start.
    spoiled: {step: rank} of single losses, the same in every start, as a sample would do it.
    once: steps whose losses are spoiled on all ranks, but not again after a rollback.
    """

    run_dir: Path
    faults: tuple[Fault, ...]
    spoiled: Mapping[int, int]
    once: range

    def arm(self) -> None:
        waiting, once, now = list(self.faults), set(self.once), 0
        backward = Engine.backward

        def begin(step: int) -> None:
            nonlocal now
            once.discard(now)
            now = step
            if waiting and step >= waiting[0].step:
                fault = waiting.pop(0)
                if fault.rank == rank():
                    say(f"{fault}: at step {step}")
                    fault.strike(self.run_dir)

        def spoil(engine: Engine, loss: torch.Tensor) -> None:
            is_spoiled = now in once or self.spoiled.get(now) == rank()
            backward(engine, loss * float("nan") if is_spoiled else loss)

        at_steps(begin)
        Engine.backward = spoil  # type: ignore[method-assign]

    @property
    def overrides(self) -> list[str]:
        """What the faults need of the config."""
        kinds = set(map(type, self.faults))
        limits = ["guard.step_minutes=0.2", "guard.data_minutes=0.2"] if Freeze in kinds else []
        return [f"engine.num_workers={int(KillWorker in kinds)}", *limits]

    def seen(self, statuses: Sequence[int], job: Job) -> bool:
        """Whether every fault has struck, and the start ended as it must."""
        struck = [line.rpartition(": at step ")[0] for line in job.output().splitlines()]
        if any(str(fault) not in struck or not fault.seen(statuses, job) for fault in self.faults):
            return False
        return self.ends or not any(statuses)

    @property
    def ends(self) -> bool:
        return any(fault.ends for fault in self.faults)


def draw_faults(rng: random.Random, num_faults: int, first_step: int, *, freeze: bool) -> list[Fault]:
    """Faults of all kinds in random order, for a run of two ranks.

    freeze: whether one of them is a Freeze, which takes half a minute.
    """
    kinds: list[type[Fault]] = [KINDS[number % len(KINDS)] for number in range(num_faults)]
    if freeze:
        kinds[-1] = Freeze
    rng.shuffle(kinds)
    faults, step = [], first_step
    for kind in kinds:
        faults.append(kind.draw(rng, step, rng.randrange(2)))
        step += rng.randint(1, MAX_GAP_STEPS)
    return faults


def starts_of(run_dir: Path, faults: Sequence[Fault], spoiled: Mapping[int, int], once: range) -> list[Start]:
    """The starts in which the faults happen. The last one reaches the end of the run."""
    parts: list[list[Fault]] = [[]]
    for fault in faults:
        parts[-1].append(fault)
        if fault.ends:
            parts.append([])
    starts = [Start(run_dir, tuple(part), spoiled, range(0)) for part in parts]
    return [dataclasses.replace(starts[0], once=once), *starts[1:]]


def failed(job: Job, reason: str) -> bool:
    """Whether the start failed for this reason, and said so in one sentence."""
    status = read_status(job)
    return status["state"] == "failed" and reason in status["reason"] and told_once(job)


def told_once(job: Job) -> bool:
    """Whether the start has printed one sentence as its end, and no traceback."""
    return job.output().count("error: ") == 1 and "Traceback" not in job.output()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
