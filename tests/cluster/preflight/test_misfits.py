"""What keeps hosts from running a job together: one sentence each, from facts alone."""

import dataclasses
import json
import time
from typing import Any

import pytest

from vitscale.cluster.preflight import speed
from vitscale.cluster.preflight.compare import Answer, Facts, facts_of, problems, table
from vitscale.cluster.preflight.program import told
from vitscale.cluster.preflight.rounds import by_host

GOOD = Facts(
    host="c1",
    address="10.0.0.1",
    checkout="/vitscale",
    python="3.11.7",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8", "vitscale": "0.1.0"},
    code="c0de",
    config="c0f1",
    index="1de8",
    run_dir="/shared/run",
    saw=4,
    free=10**12,
    cores=64,
    shm_free=10**11,
    shm_needed=10**8,
    open_files=1 << 20,
    gpus=("H100",) * 8,
    clock=0.01,
    speed=1e9,
)


def answers(**changes: Any) -> list[Answer]:
    """Four hosts of 8 GPUs; the third has these changes."""
    hosts = [
        Answer(name=f"node{n}", slots=8, facts=dataclasses.replace(GOOD, host=f"c{n}")) for n in range(1, 5)
    ]
    hosts[2] = dataclasses.replace(hosts[2], facts=dataclasses.replace(GOOD, host="c3", **changes))
    return hosts


def test_hosts_that_fit_together_have_no_problems() -> None:
    assert problems(answers()) == []
    assert problems(answers(open_files=-1)) == []  # without a limit


def test_facts_that_only_other_source_files_have_are_left_out() -> None:
    assert facts_of(json.loads(json.dumps(dataclasses.asdict(GOOD) | {"kernel": "6.1"}))) == GOOD


def test_a_host_to_which_no_other_connects_does_not_wait() -> None:
    """The other one cannot listen, and so sends nothing."""
    began = time.monotonic()
    alone = speed.with_speed(Facts(host="a", address="127.0.0.1"), 0, lambda value: [value, None])
    assert time.monotonic() - began < speed.TIMEOUT_SECONDS / 2 and not alone.refused


def test_the_speed_is_what_came_in_the_time_that_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 1.0)  # a busy machine may take a while to begin
    began = time.monotonic()
    facts = Facts(host="a", address="127.0.0.1")  # the next host is this one again
    measured = speed.with_speed(facts, 0, lambda value: [value, value])
    assert measured.speed >= len(speed.PIECE) / (time.monotonic() - began)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"versions": {**GOOD.versions, "torch": "2.12.0"}},
            "torch differs: 2.13.0 on node1, 2.12.0 on node3; run",
        ),
        (
            {"versions": {"torch": "2.13.0", "vitscale": "0.1.0"}},
            "deepspeed differs: 0.19.8 on node1, none on node3",
        ),
        ({"python": "3.12.1"}, "Python differs: 3.11.7 on node1, 3.12.1 on node3; make .venv"),
        ({"code": "beef"}, "vitscale's source files differs: c0de on node1, beef on node3; check out"),
        ({"config": "beef"}, "the config differs: c0f1 on node1, beef on node3; copy"),
        ({"index": "beef"}, "the index of the data differs: 1de8 on node1, beef on node3; copy"),
        ({"clock": -95.0}, "node3: its clock is 95 s behind, and 30 s are allowed; start a time service"),
        ({"saw": 1}, "run_dir /shared/run is not one folder on all hosts: node3 cannot see"),
        ({"gpus": ("H100",) * 7}, "node3: it has 7 GPUs and slots=8; start one process per GPU"),
        (
            {"gpus": ()},
            "node3: it has 0 GPUs and slots=8; look at its driver (nvidia-smi), or leave the host out",
        ),
        ({"gpus": ("H100",) * 7 + ("A100",)}, "node3: its GPUs differ (A100, H100)"),
        (
            {"open_files": 512},
            "node3: each of 32 ranks needs 672 open files, and the hard limit there is 512",
        ),
        (
            {"shm_free": 64 << 20},
            "node3: /dev/shm has 67.1 MB free, and the machine's data workers fill 800",
        ),
        ({"loopback": True}, "node3: its own name c3 leads to a loopback address"),
        ({"errors": ("the index i is gone",)}, "node3: the index i is gone"),
        ({"refused": "c3 cannot connect to c4"}, "c3 cannot connect to c4"),
    ],
)
def test_each_problem_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    (found,) = problems(answers(**changes))
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    ("slots", "said"), [(1, "ok: 1 process on 1 host"), (2, "ok: 2 processes on 1 host")]
)
def test_a_host_that_fits_is_counted(slots: int, said: str, capsys) -> None:
    facts = dataclasses.replace(GOOD, saw=1, gpus=("H100",) * slots)
    assert told([Answer(name="node1", slots=slots, facts=facts)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_an_interface_that_a_host_lacks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, missing in (("", ""), ("lo", ""), ("lo,eth77", "eth77")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
        assert speed.missing_interface() == missing


@pytest.mark.parametrize(
    "hosts", ["aaaabbbb", "abababab", "abbaabab"], ids=["in blocks", "cyclic", "in any order"]
)
@pytest.mark.parametrize(
    ("gpus", "counted"), [(4, 4), (1, 4), (2, 2)], ids=["all GPUs", "a GPU of its own", "fewer than ranks"]
)
def test_the_ranks_of_a_host_are_counted_together_wherever_they_are(
    hosts: str, gpus: int, counted: int
) -> None:
    rows = [dataclasses.replace(GOOD, host=host, gpus=("H100",) * gpus, clock=50.5) for host in hosts]
    firsts = [host not in hosts[:rank] for rank, host in enumerate(hosts)]
    found = by_host(rows, firsts, 50.0)
    assert [(answer.name, answer.slots) for answer in found] == [("a", 4), ("b", 4)]
    assert [(len(a.facts.gpus), a.facts.clock) for a in found if a.facts] == [(counted, 0.5)] * 2


def test_what_all_hosts_say_is_said_once() -> None:
    facts = dataclasses.replace(GOOD, errors=("there is no key modle",), config="", index="")
    assert problems([Answer(name=name, slots=8, facts=facts) for name in "abcd"]) == ["there is no key modle"]


def test_a_host_without_an_answer_has_a_row_and_its_sentence() -> None:
    hosts = answers()
    hosts[1] = Answer(name="node2", slots=8, trouble="node2 cannot be reached", unreachable=True)
    hosts = [
        dataclasses.replace(host, facts=dataclasses.replace(host.facts, saw=3)) if host.facts else host
        for host in hosts
    ]
    assert problems(hosts) == ["node2 cannot be reached"]
    lines = table(hosts).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["node2", "8", "no", "answer"]
    assert "8 H100" in lines[1] and "1.00 GB/s" in lines[1]


def test_run_directories_need_not_be_shared_with_a_store() -> None:
    hosts = [
        Answer(name=name, slots=8, facts=dataclasses.replace(GOOD, shared=False, saw=1)) for name in "abcd"
    ]
    assert problems(hosts) == []
