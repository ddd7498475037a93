"""Ranks as new processes, for a GPU: a fork of the zygote cannot use one."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from multiprocess.job import TIMEOUT_SECONDS, reserved_port

SPAWNED = multiprocessing.get_context("spawn")


class Fresh:
    """Runs functions as Zygote does, each rank in some seconds for its imports."""

    def run(
        self,
        world_size: int,
        function: Callable[..., int | None],
        *arguments: object,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> list[int | None]:
        """As Zygote.run, but none is killed because another failed; None = it did not end."""
        common = {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1"}
        common |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        with reserved_port() as port, contextlib.ExitStack() as ended:
            processes = []
            for rank in range(world_size):
                own = {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, **(environment or {})}
                process = SPAWNED.Process(target=_rank, args=(log, function, arguments))
                with pytest.MonkeyPatch.context() as patch:
                    for name, value in {**common, **own}.items():
                        patch.setenv(name, str(value))
                    process.start()
                processes.append(process)
                ended.callback(_kill, process.pid)
            for process in processes:
                process.join(TIMEOUT_SECONDS)
            return [process.exitcode for process in processes]


def _rank(log: Path, function: Callable[..., int | None], arguments: tuple[object, ...]) -> None:
    os.setsid()
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.exit(function(*arguments))


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
