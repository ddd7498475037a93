"""A run in a folder, and its commands: started, watched, and killed as by a node failure."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from make import steps_on_disk

from vitscale.checkpoint import store
from vitscale.metrics.rows import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "launch" / "train.py"
TIMEOUT_SECONDS = 240  # much more than anything takes, also beside other work

CONFIG = """
run_dir = "{run_dir}"
seed = 7
global_batch = 8
total_steps = 20

[model]
variant = "Ti/4"
width = 16
depth = 2
num_heads = 2
mlp_dim = 32
image_size = 8
num_classes = 5
representation_size = 8

[data]
index = "{index}"
lanes = 4
window_chunks = 2

[optim]
lr = 5e-3
weight_decay = 0.1
clip_norm = 1.0

[schedule]
decay = "cosine"
warmup_steps = 5

[engine]
micro_batch = 2
num_workers = 0

[checkpoint]
every_steps = 3
keep_last = 2

[log]
every_steps = 1
tensorboard = false
"""


def wait_until(
    holds: Callable[[], object], output: Callable[[], object], *processes: subprocess.Popen[bytes]
) -> None:
    """Wait for a condition; if it does not come, or a process ends, output() is shown."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert all(process.poll() is None for process in processes), output()
        assert time.monotonic() < deadline, output()
        time.sleep(0.05)


class Job:
    """A training run in a folder of its own."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.run_dir = folder / "run"
        self.config = folder / "config.toml"
        self.log = folder / "log"  # of all ranks together
        self.port = 0  # MASTER_PORT of the last start
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.format(run_dir=self.run_dir, index=index))

    def mistake(self) -> str:
        """The sentence that the last start printed; a traceback would be our bug."""
        assert "Traceback" not in self.output(), self.output()
        return [line for line in self.output().splitlines() if line.startswith("error: ")][-1]

    def start(
        self, world_size: int, *overrides: str, kill_when: Callable[[], object] | None = None
    ) -> list[int]:
        """Run launch/train.py on every rank to its end, or SIGKILL all once kill_when() holds.

        Returns the exit statuses in rank order.
        """
        with self.ranks(world_size, *overrides) as processes:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while any(process.poll() is None for process in processes):
                assert time.monotonic() < deadline, self.output()
                if kill_when and kill_when():
                    for process in processes:
                        process.kill()
                if any(process.poll() not in (None, 0) for process in processes):
                    time.sleep(0.5)  # what a launcher does when a rank has failed
                    for process in processes:
                        process.kill()
                time.sleep(0.002)
            return [process.returncode for process in processes]

    @contextlib.contextmanager
    def ranks(self, world_size: int, *overrides: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The running processes of launch/train.py; those still alive are killed at the end."""
        command = [sys.executable, PROGRAM, self.config, *overrides]
        with reserved_port() as self.port:
            common = {
                "OMP_NUM_THREADS": 1,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.port,
            }
            processes = [
                self.popen(command, {**common, "RANK": rank, "LOCAL_RANK": rank})
                for rank in range(world_size)
            ]
            try:
                yield processes
            finally:
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                    process.wait()

    def launch(self, launcher: str, *arguments: str) -> int:
        """Run the job by a launcher with these arguments. Returns its exit status."""
        program = Path(sys.executable).with_name(launcher)
        with reserved_port() as self.port:
            ports = ["--master_port", self.port]
            process = self.popen([program, *arguments, *ports, PROGRAM, self.config], {"OMP_NUM_THREADS": 1})
            try:
                return process.wait(TIMEOUT_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the ranks, where it did not end in time

    def popen(self, command: list[object], environment: Mapping[str, object]) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; what it prints is added to the log."""
        env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        with open(self.log, "ab") as file:
            return subprocess.Popen(
                list(map(str, command)), env=env, stdout=file, stderr=file, start_new_session=True
            )

    def output(self) -> str:
        """What all ranks have printed so far."""
        return self.log.read_text()

    def reached(self, step: int) -> Callable[[], bool]:
        """Whether the run has logged `step`."""
        return lambda: any(row["step"] >= step for row in self.rows())

    def rows(self) -> list[dict]:
        """The training rows of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return [row for row in read_metrics(path) if "train/loss" in row] if path.exists() else []

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows()]

    def checkpoints(self) -> dict[int, Path]:
        """The folders of all committed checkpoints, by step."""
        directory = store.directory_of(self.run_dir)
        return {step: store.step_directory(directory, step) for step in steps_on_disk(directory)}

    def temporary_saves(self) -> list[Path]:
        return list(store.directory_of(self.run_dir).glob(".tmp-step-*"))


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port that the system gives to nobody else meanwhile.

    It is held by a socket that is bound and does not listen. This socket and torch's store both
    set SO_REUSEADDR, so that rank 0 can listen on the port all the same.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
