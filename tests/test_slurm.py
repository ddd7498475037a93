"""Slurm's variables, as srun sets them, in torchrun's terms."""

import pytest

from vitscale import slurm

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert slurm.variables(TASK) == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + (17 * 1234 + 2) % 20_000),
    }
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm.variables(TASK | chosen).items() >= chosen.items()


@pytest.mark.parametrize(
    "missing",
    [
        {"SLURM_STEP_NUM_TASKS": ""},  # a batch script, which runs once
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": ""},
    ],
)
def test_other_processes_are_none(missing: dict[str, str]) -> None:
    environment = {name: value for name, value in (TASK | missing).items() if value}
    assert slurm.variables(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[007-012,020],gpu3", "node007"),
        ("rack[2-3]node[05,07]-ib,x", "rack2node05-ib"),
    ],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert slurm.first_host(nodes) == host


@pytest.mark.parametrize(("counts", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2])])
def test_tasks_per_node(counts: str, tasks: list[int]) -> None:
    assert slurm.tasks_per_node(counts) == tasks
