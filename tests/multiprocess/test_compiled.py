"""Compiled blocks: the results of eager ones, from one graph made once."""

from pathlib import Path

import pytest
from multiprocess.compiled import compare
from multiprocess.job import Job
from multiprocess.zygote import Zygote


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks_share_one_graph_that_evaluation_does_not_touch(
    tmp_path: Path, zygote: Zygote, mode: str
) -> None:
    """Otherwise training would be compiled for the batches of evaluation, or for any size."""
    log = tmp_path / "log"
    assert zygote.run(1, compare, tmp_path, mode, log=log) == [0], log.read_text()
    assert (tmp_path / "graphs").read_text() == "1"
    assert log.read_text() == ""


def test_a_compiled_run_has_the_losses_of_an_eager_one(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, "engine.compile=true", "engine.zero_stage=2") == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-5)
