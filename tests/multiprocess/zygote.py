"""Ranks forked from a process that has imported everything: they start in a tenth of a second.

    zygote = Zygote()
    zygote.train(job, 2, "engine.zero_stage=3", event=Kill(rank=1, save=0, effect=30))
        ->  [1, -9]

They are processes of their own with gloo between them, as a launcher starts them.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from multiprocess import ranks
from multiprocess.job import Job, reserved_port

TESTS = Path(__file__).resolve().parents[1]
PATH = f"{TESTS}:{TESTS.parent}"
# What a run imports, the last only as it makes an optimizer.
IMPORTS = ("deepspeed", "vitscale.train", "torch._dynamo")
GRACE_SECONDS = 0.3  # from the failure of one rank to the kill of the others
Environment = Mapping[str, str | None]


class Zygote:
    """The parent of many short jobs."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [PATH, os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._jobs, theirs = Pipe()
        with theirs:
            code = f"from multiprocess.zygote import main; main({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], env=env, pass_fds=[theirs.fileno()]
            )

    def train(
        self,
        job: Job,
        world_size: int,
        *overrides: str,
        event: ranks.Event | None = None,
        environment: Environment | None = None,
    ) -> list[int]:
        """Train the job to its end, or to where the event ends it. Returns what run returns."""
        return self.run(
            world_size, ranks.train, job.config, overrides, event, log=job.log, environment=environment
        )

    def run(
        self,
        world_size: int,
        function: Callable[..., int | None],
        *arguments: object,
        log: Path,
        timeout_seconds: float = 120,
        environment: Environment | None = None,
    ) -> list[int]:
        """Run a function of a module on every rank of a job to its end; they print to `log`.

        When one has failed, the others are killed a little later. environment: changes to the
        zygote's own; None unsets a variable. Returns the exit statuses in rank order; a rank
        that a signal ended has minus its number.
        """
        self._jobs.send((world_size, function, arguments, log, timeout_seconds, environment or {}))
        return self._jobs.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main(descriptor: int) -> None:
    """Run the jobs that the parent sends through the pipe of that descriptor."""
    jobs = Connection(descriptor)
    for module in IMPORTS:
        importlib.import_module(module)
    torch.set_num_threads(1)
    # Ranks wait for one another many times in a step, and each time for what computes beside
    # them: with two busy cores, a run takes five times as long without priority.
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    gc.freeze()  # DeepSpeed collects garbage six times per engine; nothing imported is garbage
    while True:
        jobs.send(_job(*jobs.recv()))


def _job(
    world_size: int,
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    log: Path,
    timeout_seconds: float,
    environment: dict[str, str | None],
) -> list[int]:
    environment |= {"MASTER_ADDR": "127.0.0.1"}
    environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    pids: list[int] = []
    with reserved_port() as port:
        environment["MASTER_PORT"] = str(port)
        for rank in range(world_size):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(_fork(pids[0] if pids else 0, environment, function, arguments, log))
        try:
            return _wait(pids, timeout_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pids[0], signal.SIGKILL)  # data workers of ranks that were killed


def _wait(pids: list[int], timeout_seconds: float) -> list[int]:
    """The exit statuses of all ranks; after a failure or the timeout, the rest is killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if statuses[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        select.select([], [], [], 0.005)
    return [statuses[pid] for pid in pids]


def _fork(
    group: int,
    environment: Mapping[str, str | None],
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    log: Path,
) -> int:
    """Start a rank in a process group (0: in a new one). Returns its process id."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # both sides do it: neither may run on before it is done
            os.setpgid(pid, group or pid)
        return pid
    status = 1
    try:
        os.setpgid(0, group)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        status = function(*arguments) or 0
    except BaseException:  # whatever was raised, a fork must not return into its parent's code
        traceback.print_exc()
    finally:
        os._exit(status)
