"""Start real ranks of launch/train.py, watch them, and kill them as a node failure would."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vitscale.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 180

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


class Job:
    """A training run in a folder: `start` gives its ranks, which end or are killed before it returns."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.run_dir = folder / "run"
        self.config = folder / "config.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.format(run_dir=self.run_dir, index=index))

    def start(
        self,
        world_size: int,
        *overrides: str,
        kill_when: Callable[[], object] | None = None,
        kill_delay_seconds: float = 0.0,
    ) -> list[int]:
        """Run `world_size` ranks to their end, or SIGKILL them all soon after `kill_when()` holds.

        Returns their exit statuses.
        """
        with self.ranks(world_size, *overrides) as processes:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while any(process.poll() is None for process in processes):
                assert time.monotonic() < deadline, self.output()
                if kill_when and kill_when():
                    time.sleep(kill_delay_seconds)
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
        """The running processes of a job; whatever is left of them is killed at the end."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        common = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes = []
        for rank in range(world_size):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, **common}
            command = [sys.executable, ROOT / "launch" / "train.py", self.config, *overrides]
            with open(self.run_dir.parent / f"rank-{rank}.log", "ab") as log:
                processes.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        env={k: str(v) for k, v in env.items()},
                        stdout=log,
                        stderr=log,
                    )
                )
        try:
            yield processes
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run_dir.parent.glob("rank-*.log")))

    def reached(self, step: int) -> Callable[[], bool]:
        """Whether the run has logged `step`."""
        return lambda: any(row["step"] >= step for row in self.rows())

    def rows(self) -> list[dict]:
        """The training rows of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return [row for row in read_metrics(path) if "train/loss" in row] if path.exists() else []

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows()]

    def temporary_saves(self) -> list[Path]:
        return list((self.run_dir / "checkpoints").glob(".tmp-step-*"))
