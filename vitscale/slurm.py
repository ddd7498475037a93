"""What srun tells its tasks, in the variables that torchrun and deepspeed set."""

import os
import re
from collections.abc import Mapping

from vitscale.errors import ConfigError

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that systems give to clients


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the others for a task of srun; empty for any other process.

    SLURM_STEP_NUM_TASKS tells a task of srun from a batch script, which has SLURM_NTASKS and
    SLURM_PROCID, too, and runs once. MASTER_ADDR and MASTER_PORT are kept if they are set; else
    they are the step's first node, and a port that follows from the numbers of job and step.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in environment:
        return {}
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
        ),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (17 * job + step) % NUM_PORTS),
    }
    return found | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}


def launched() -> Mapping[str, str]:
    """The environment of this process, with the variables that srun lacks.

    Raises ConfigError for one that no launcher leaves.
    """
    if "WORLD_SIZE" not in os.environ:
        try:
            os.environ.update(variables(os.environ))
        except (LookupError, ValueError, OverflowError, MemoryError) as error:
            raise ConfigError(
                "SLURM_STEP_NUM_TASKS says that this is a task of srun, but another variable of its step is "
                f"missing or damaged ({error!r}); start it with srun, or unset SLURM_STEP_NUM_TASKS"
            ) from None
    of_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in of_a_launcher if "WORLD_SIZE" in os.environ else ("RANK",):
        if not re.fullmatch(r"\d{1,9}", text := os.environ.get(name, "0")):
            raise ConfigError(
                f"{name} in the environment is {text!r}, and must be a whole number; unset it, or start with "
                "torchrun, deepspeed or srun"
            )
    return os.environ


def first_host(nodes: str) -> str:
    """The first host of a list of Slurm's: "node[007-012,020],gpu3" -> "node007"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def tasks_per_node(counts: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks
