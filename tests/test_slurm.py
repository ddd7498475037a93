"""Slurm's variables, as srun sets them, in torchrun's terms."""

import os

import pytest

from vitscale import slurm
from vitscale.errors import ConfigError

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
    ("damage", "sentence"),
    [
        ({"SLURM_LOCALID": ""}, r"says that this is a task of srun, but .*KeyError\('SLURM_LOCALID'\)"),
        ({"SLURM_NODEID": "9"}, "another variable of its step is missing or damaged"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x99999999999999999999)"}, "is missing or damaged"),
        ({"SLURM_PROCID": "x"}, "RANK in the environment is 'x', and must be a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE in the environment is '-1'"),
    ],
)
def test_an_environment_that_no_launcher_leaves_is_refused(
    monkeypatch: pytest.MonkeyPatch, damage: dict[str, str], sentence: str
) -> None:
    environment = {name: value for name, value in (TASK | damage).items() if value}
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(ConfigError, match=sentence):
        slurm.launched()


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
