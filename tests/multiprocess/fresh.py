"""Ranks as new processes, for a GPU: a fork of the zygote cannot use one."""

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from multiprocess.job import TIMEOUT_SECONDS, popen, reserved_port
from multiprocess.zygote import PATH

CODE = """
import pickle, sys
function, arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
sys.exit(function(*arguments))
"""


class Fresh:
    """Runs functions as Zygote does, each rank in some seconds for its imports."""

    def run(
        self,
        world_size: int,
        function: Callable[..., int | None],
        *arguments: object,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> list[int]:
        """As Zygote.run; each rank is a process group of its own."""
        command = [sys.executable, "-c", CODE, pickle.dumps((function, arguments)).hex()]
        common = {"PYTHONPATH": f"{PATH}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": 1}
        common |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        with reserved_port() as port, contextlib.ExitStack() as ended:
            processes = []
            for rank in range(world_size):
                own = {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, **(environment or {})}
                processes.append(popen(command, common | own, log))
                ended.callback(_kill, processes[-1].pid)
            return [process.wait(TIMEOUT_SECONDS) for process in processes]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
