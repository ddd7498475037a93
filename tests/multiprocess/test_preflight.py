"""Two hosts are asked whether they fit together: within seconds, a sentence for each misfit."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from multiprocess.clocks import compare
from multiprocess.hosts import ROOT, Hosts, two_hosts
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale.data.index import Index

PYTHON = ROOT / ".venv" / "bin" / "python"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


def test_hosts_that_fit_and_hosts_that_do_not(tmp_path: Path, index: Path, hosts: Hosts) -> None:
    job = Job(tmp_path / "job", index)
    began = time.monotonic()
    status, table, errors = preflight(hosts, job, "node1", "node2")
    assert (status, errors) == (0, []), errors
    assert [line.split()[0] for line in table] == ["host", "node1", "node2", "ok:"]
    assert all("B/s" in line for line in table[1:3]), table
    print(f"{time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 30  # 15 where nothing runs beside it
    assert not job.run_dir.exists()  # it leaves nothing

    # node2 gets another config, another index, another torch and a run_dir of its own.
    other = tmp_path / "other"
    other.mkdir()
    (torch,) = (ROOT / ".venv").glob("lib/python*/site-packages/torch-*.dist-info/METADATA")
    for path, old, new in (
        (job.config, "seed = 7", "seed = 8"),
        (torch, "\nVersion: ", "\nVersion: 1.0+"),
    ):
        text = path.read_text()
        assert old in text, path
        (other / path.name).write_text(text.replace(old, new))
    data = Index.load(str(index))
    shards = (dataclasses.replace(data.shards[0], checksum="0" * 32), *data.shards[1:])
    dataclasses.replace(data, shards=shards).save(other / index.name)
    for path in (job.config, torch, index):
        assert hosts.run(2, "mount", "--bind", other / path.name, path).returncode == 0
    job.run_dir.mkdir()
    assert hosts.run(2, "mount", "-t", "tmpfs", "tmpfs", job.run_dir).returncode == 0
    status, _, errors = preflight(hosts, job, "node1", "node2")
    assert status == 2
    beginnings = ["torch differs: ", "the config differs: ", "the index of the data differs: ", "run_dir "]
    assert [next((b for b in beginnings if line.startswith(b)), line) for line in errors] == beginnings
    assert "1.0+" in errors[0] and f"{job.run_dir} is not one folder on all hosts" in errors[3]

    assert hosts.run(2, "mount", "-t", "tmpfs", "tmpfs", ROOT / "launch").returncode == 0
    status, _, errors = preflight(hosts, job, "node1", "node2", "node9")
    assert status == 2 and len(errors) == 2
    assert (
        errors[0] == f"node2 has no checkout of vitscale at {ROOT}; it must be at the same path on all hosts"
    )
    assert errors[1].startswith("node9 cannot be reached by ssh: ") and "`ssh node9 hostname`" in errors[1]


def test_a_long_look_at_the_shards_is_not_taken_for_clocks_that_differ(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    log = tmp_path / "log"
    assert zygote.run(2, compare, str(Job(tmp_path, index).config), log=log) == [0, 0], log.read_text()


def preflight(hosts: Hosts, job: Job, *names: str) -> tuple[int, list[str], list[str]]:
    """The status of launch/preflight.py on node1, the lines that it prints, and its errors."""
    hostfile = hosts.folder / "hostfile"
    slots = {name: 1 for name in names} | {
        "node1": 2 if len(names) == 3 else 1
    }  # 3 ranks cannot share 4 lanes
    hostfile.write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
    ended = hosts.run(1, PYTHON, "launch/preflight.py", hostfile, job.config)
    errors = ended.stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors), ended.stderr
    return ended.returncode, ended.stdout.splitlines(), [line.removeprefix("error: ") for line in errors]
