"""What ranks tell one another: errors, flags and manifests to all, rows and texts to rank 0."""

import json
from pathlib import Path

import pytest
from make import edit_manifest, state_of, write_step
from multiprocess.collectives import agree, fail, find, gather, join_alone, lose_the_last
from multiprocess.zygote import Zygote


def results(zygote: Zygote, folder: Path, way: str, kind: str, failing: int) -> list[object]:
    """What each of two ranks gets where rank `failing` fails."""
    log = folder / "log"
    statuses = zygote.run(2, fail, folder, way, kind, failing, log=log)
    assert statuses == [0, 0], log.read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("way", "failing"), [("on_main", 0), ("together", 0), ("together", 1)])
@pytest.mark.parametrize("kind", ["ConfigError", "StoreError", "BusyError"])
def test_a_mistake_of_one_rank_is_raised_on_all(
    tmp_path: Path, zygote: Zygote, way: str, failing: int, kind: str
) -> None:
    error = {"kind": kind, "message": "what is wrong", "shared": True}
    assert results(zygote, tmp_path, way, kind, failing) == [error, error]


def test_a_disk_that_refuses_one_rank_is_a_store_error_on_all(tmp_path: Path, zygote: Zygote) -> None:
    error = {"kind": "StoreError", "message": "/full: No space left on device", "shared": True}
    assert results(zygote, tmp_path, "together", "OSError", 1) == [error, error]


def test_without_a_mistake_each_rank_gets_its_result_or_that_of_rank_0(
    tmp_path: Path, zygote: Zygote
) -> None:
    assert results(zygote, tmp_path, "on_main", "ConfigError", 5) == [[0, 7], [0, 7]]
    assert results(zygote, tmp_path, "together", "ConfigError", 5) == [[0, 7], [1, 7]]


def test_ranks_that_do_not_come_are_counted_in_one_sentence(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    assert zygote.run(1, join_alone, 2, log=log) == [1]
    assert log.read_text().startswith("error: 1 of 2 ranks came within "), log.read_text()
    assert log.read_text().count("\n") == 1, log.read_text()


def test_a_rank_that_is_lost_outside_of_a_run_is_one_sentence(tmp_path: Path, zygote: Zygote) -> None:
    """As in the preparation of a run, or in an evaluation by hand: no traceback."""
    log = tmp_path / "log"
    assert zygote.run(2, lose_the_last, log=log) == [1, 0]
    assert log.read_text().startswith("error: rank 0 lost the connection to another rank, which has ended")
    assert log.read_text().count("\n") == 1, log.read_text()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_flag_of_one_rank_is_known_to_all_after_the_next_call(
    tmp_path: Path, zygote: Zygote, world_size: int
) -> None:
    log = tmp_path / "log"
    assert zygote.run(world_size, agree, tmp_path, log=log) == [0] * world_size, log.read_text()
    for rank in range(world_size):
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answers == [[False, False]] * 3 + [[True, False]] + [[False, False]]


@pytest.mark.parametrize(("with_value", "first"), [(0, "rank 0"), (2, "rank 2"), (3, None)])
def test_rank_0_alone_gets_the_rows_and_texts_of_all(
    tmp_path: Path, zygote: Zygote, with_value: int, first: str | None
) -> None:
    log = tmp_path / "log"
    assert zygote.run(3, gather, tmp_path, with_value, log=log) == [0, 0, 0], log.read_text()
    sent = [2, "x" * 1000]
    rows, texts = [[], [[1, 1]], [[2, 2], [2, 2]]], [{"rank": ""}, {"rank": "é"}, {"rank": "éé"}]
    everything = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert everything == [
        {"rows": rows, "texts": texts, "sent": sent, "first": first},
        {"rows": [], "texts": [], "sent": sent, "first": first},
        {"rows": [], "texts": [], "sent": sent, "first": first},
    ]


@pytest.mark.parametrize(
    ("nodes", "said", "reads"),
    [
        ([0, 0, 0], "checkpoints/step-000000003", [1, 0, 0]),
        ([0, 0, 1, 1], "checkpoints/step-000000003", [1, 0, 1, 0]),
        (
            [0, 0, 2, 2],
            "differs between ranks 0 and 2: it must be on a file system that all nodes share",
            [1, 0, 1, 0],
        ),
        (
            [0, 3, 3],
            "differs between ranks 0 and 1: it must be on a file system that all nodes share",
            [1, 1, 0],
        ),
    ],
)
def test_a_manifest_is_read_by_rank_0_and_compared_once_per_node(
    tmp_path: Path, zygote: Zygote, nodes: list[int], said: str, reads: list[int]
) -> None:
    """Nodes 0 and 1 see the same files; node 2 has another manifest, and node 3 has none."""
    for node in range(3):
        write_step(tmp_path / f"run-{node}", 3, state_of(3))
    (tmp_path / "run-3").mkdir()
    other = tmp_path / "run-2" / "checkpoints" / "step-000000003" / "manifest.json"
    edit_manifest(other, lambda values: values["train"].update(samples_seen=1))
    log = tmp_path / "log"
    world = len(nodes)
    statuses = zygote.run(world, find, tmp_path / "run", nodes, tmp_path / "result", log=log)
    assert statuses == [0] * world, log.read_text()
    results = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(world)]
    assert all(said in sentence for sentence, _ in results), results
    assert [count for _, count in results] == reads
