"""A job under a real launcher, and what became of it after a signal."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from multiprocess.job import PROGRAM, TIMEOUT_SECONDS, Job, reserved_port, wait_until

from vitscale.guard import ending

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"],
}
# Long enough to be hit in mid-run, with data workers, and with checkpoints on the way.
OVERRIDES = ("total_steps=1000000", "engine.num_workers=1", "checkpoint.every_steps=40")


@dataclasses.dataclass(frozen=True)
class Case:
    """A signal to one of a job's processes.

    target: "command" (what the user started), "group" (its process group, as a terminal does),
        "launch.py" (deepspeed's process on each node), "rank 0", "rank 1" or "worker" (a data
        worker of the last rank).
    """

    launcher: str
    signal: signal.Signals
    target: str

    def __str__(self) -> str:
        return f"{self.launcher}: {self.signal.name} to {self.target}"


@dataclasses.dataclass(frozen=True)
class End:
    """seconds: from the signal to the end of the last process. left: commands that live on."""

    seconds: float
    status: int
    run: dict[str, Any]
    causes: list[str]
    newest: int
    logged: int
    left: list[str]

    def __str__(self) -> str:
        return (
            f"{self.seconds:4.1f} s  status {self.status:4}  {self.run['state']:9}  "
            f"saved {self.newest}, logged {self.logged}  {self.run['reason'][:60]}"
        )


def end_of(case: Case, job: Job) -> End:
    """Start the job, send the signal once it has a checkpoint, and wait until all are gone."""
    with launched(job, case.launcher) as command:
        wait_until(lambda: bool(job.checkpoints()) and job.reached(45)(), job.output, command)
        processes = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
        deliver(case, command, processes)
        began = time.monotonic()
        status = command.wait(TIMEOUT_SECONDS)
        _, alive = psutil.wait_procs(processes, max(0, began + TIMEOUT_SECONDS - time.monotonic()))
        seconds = time.monotonic() - began
        left = [" ".join(process.cmdline()) for process in alive]
        for process in alive:
            process.kill()
    run = read_status(job)
    lines = job.output().splitlines()
    # Launchers print tracebacks of their own; ours begin in the program.
    causes = [line for line in lines if line.startswith("error: ") or f'File "{PROGRAM}"' in line]
    newest = max(job.checkpoints())
    return End(seconds, status, run, causes, newest, job.rows()[-1]["step"], left)


@contextlib.contextmanager
def launched(
    job: Job, launcher: str, *arguments: str, overrides: tuple[str, ...] = OVERRIDES, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a launcher that runs the job; what lives on is killed at the end."""
    with reserved_port() as port:
        command = [*LAUNCHERS[launcher], *arguments]
        if launcher != "python":
            command += ["--master_port", str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
        with open(job.log, "ab") as log:
            process = subprocess.Popen(
                [*command, str(PROGRAM), str(job.config), *overrides],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def deliver(case: Case, command: subprocess.Popen[bytes], processes: list[psutil.Process]) -> None:
    if case.target == "group":
        os.killpg(command.pid, case.signal)
        return
    if case.target == "command":
        chosen = command.pid
    elif case.target == "launch.py":
        (chosen,) = [p.pid for p in processes if "deepspeed.launcher.launch" in " ".join(p.cmdline())]
    elif case.target == "worker":
        chosen = data_worker_of(ranks_of(processes)[-1]).pid
    else:
        chosen = ranks_of(processes)[int(case.target.removeprefix("rank "))].pid
    os.kill(chosen, case.signal)


def ranks_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The ranks among the processes of a job, the launcher first, in rank order.

    A launcher gives its ranks RANK; their data workers have it, too.
    """
    by_pid = {process.pid: process for process in processes}
    with_rank = {pid for pid, process in by_pid.items() if "RANK" in process.environ()}
    ranks = [by_pid[pid] for pid in with_rank if by_pid[pid].ppid() not in with_rank]
    return sorted(ranks, key=lambda process: int(process.environ()["RANK"])) or processes[:1]


def data_worker_of(rank: psutil.Process) -> psutil.Process:
    """The child that runs the same command line; the resource tracker has another one."""
    return next(child for child in rank.children() if child.cmdline() == rank.cmdline())


def read_status(job: Job) -> dict[str, Any]:
    """The content of the run's status.json."""
    status = ending.read(job.run_dir)
    assert status, job.output()
    return status
