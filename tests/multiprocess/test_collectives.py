"""What one rank raises or asks for reaches every rank."""

import json
from pathlib import Path

import pytest
from multiprocess.collectives import agree, fail
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


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_flag_of_one_rank_is_known_to_all_after_the_next_call(
    tmp_path: Path, zygote: Zygote, world_size: int
) -> None:
    log = tmp_path / "log"
    assert zygote.run(world_size, agree, tmp_path, log=log) == [0] * world_size, log.read_text()
    for rank in range(world_size):
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answers == [[False, False]] * 3 + [[True, False]] + [[False, False]]
