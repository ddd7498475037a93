"""Ranks forked from a process that has imported everything: they start in a tenth of a second, not in ten.

    zygote = Zygote(); zygote.run(2, "multiprocess.ranks:train", "config.toml", log=Path("log"))  ->  [0, 0]

Nothing else differs from ranks that a launcher starts: own processes, gloo between them, real signals.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PATH = f"{TESTS}:{TESTS.parent}"
GRACE_SECONDS = 0.3  # between the death of one rank and the end of the others, as a launcher does it


class Zygote:
    """The parent of many short jobs."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "multiprocess.zygote"],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        world_size: int,
        function: str,
        *arguments: object,
        log: Path,
        timeout_seconds: float = 60,
        environment: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Run `function` ("module:name") on every rank of a job to its end; the arguments arrive as text.

        When a rank fails or is killed the others are killed a little later. Returns the exit statuses, minus
        the signal number where a signal ended it.
        """
        assert self._process.stdin and self._process.stdout
        environment = {**(environment or {}), "WORLD_SIZE": str(world_size)}
        request = [environment, function, list(map(str, arguments)), str(log), timeout_seconds]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401 (imported for the children)

    import vitscale.train  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_job(*json.loads(line))), flush=True)


def _job(
    environment: dict[str, str], function: str, arguments: list[str], log: str, timeout_seconds: float
) -> list[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
    world_size = int(environment["WORLD_SIZE"])
    environment["LOCAL_WORLD_SIZE"] = environment["WORLD_SIZE"]
    pids = [_fork(rank, environment, function, arguments, log) for rank in range(world_size)]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(statuses) < world_size:
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


def _fork(rank: int, environment: dict[str, str], function: str, arguments: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        module, _, name = function.partition(":")
        status = getattr(importlib.import_module(module), name)(*arguments) or 0
    except BaseException:  # a fork must never return into its parent's code, whatever was raised
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
