"""Open files: how many a rank needs, that it gets them, and that so many do no harm."""

import json
from pathlib import Path

import pytest
from multiprocess import open_files
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale.system.open_files import needed


def results(folder: Path, world_size: int) -> list[list]:
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(world_size)]


def test_a_rank_raises_the_soft_limit_to_the_hard_one(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    statuses = zygote.run(2, open_files.join, 100, 600, tmp_path / "result", log=log)
    assert statuses == [0, 0], log.read_text()
    assert results(tmp_path, 2) == [["joined", False, 600, 600]] * 2


def test_a_hard_limit_that_is_too_low_is_refused_once_per_node(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    statuses = zygote.run(2, open_files.join, 100, 521, tmp_path / "result", log=log)
    assert statuses == [0, 0], log.read_text()
    (said, shared, *_), (_, shared_by_other, *_) = results(tmp_path, 2)
    assert said.startswith("each of 2 ranks needs 522 open files, and ")
    assert "allows 521: raise the hard limit to 522 (nofile in /etc/security/limits.conf" in said
    assert (shared, shared_by_other) == (False, True)


def test_signals_are_noticed_with_more_files_open_than_select_can_take(
    tmp_path: Path, zygote: Zygote
) -> None:
    log, result = tmp_path / "log", tmp_path / "result"
    assert zygote.run(1, open_files.watch, result, log=log) == [0], log.read_text()
    assert result.read_text() == "SIGTERM (rank 0)"


@pytest.mark.parametrize("stage", [1, 3])
def test_sockets_are_three_a_rank_and_two_more_on_rank_0(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int
) -> None:
    counted = {}
    for world in (2, 4):
        job = Job(tmp_path / str(world), index)
        options = (f"engine.zero_stage={stage}", "total_steps=8")
        result = tmp_path / str(world) / "result"
        statuses = zygote.run(world, open_files.count, job.config, options, result, log=job.log)
        assert statuses == [0] * world, job.output()
        counted[world] = results(result.parent, world)
        assert max(files for files, _ in counted[world]) < needed(world) - 450
    growth = [after[1] - before[1] for before, after in zip(counted[2], counted[4], strict=False)]
    assert growth == [2 * 5, 2 * 3]
