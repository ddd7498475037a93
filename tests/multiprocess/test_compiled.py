"""Compiled blocks: the results of eager ones, from graphs made once."""

from pathlib import Path

import pytest
from multiprocess.compiled import compare, count_runs, skip_after_a_step
from multiprocess.job import Job
from multiprocess.zygote import Zygote


@pytest.mark.parametrize(
    ("kind", "mode", "graphs"),
    [
        ("vit", "none", 2),
        ("vit", "selective", 2),
        ("vit", "full", 2),
        ("relative", "selective", 1),
        ("axial", "selective", 2),
        ("resnet", "selective", 2),
        ("hybrid", "full", 3),
    ],
)
def test_blocks_share_graphs_that_evaluation_does_not_touch(
    tmp_path: Path, zygote: Zygote, sweep: bool, kind: str, mode: str, graphs: int
) -> None:
    """Otherwise training would be compiled for the batches of evaluation, or for any size.

    The last block of a ViT has one of its own where only the class token is read, and axial
    attention one for rows and one for columns. A ResNet has
    one for the first block of each stage, and one for the others; so has the stem
    of a hybrid. Without --sweep, kernels are made of one ViT.
    """
    log = tmp_path / "log"
    kernels = sweep or (kind, mode) == ("vit", "selective")
    assert zygote.run(1, compare, tmp_path, kind, mode, kernels, log=log) == [0], log.read_text()
    assert (tmp_path / "graphs").read_text() == str(graphs)
    assert log.read_text() == ""


def test_every_compiled_case_of_a_bench_runs_its_graphs(tmp_path: Path, zygote: Zygote) -> None:
    """They are more than the 8 that torch makes of the same code by default."""
    log = tmp_path / "log"
    assert zygote.run(1, count_runs, tmp_path, log=log) == [0], log.read_text()
    assert (tmp_path / "runs").read_text() == "5 5"


def test_a_stop_while_waiting_for_data_compiles_nothing(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.run(1, skip_after_a_step, job.config, tmp_path, log=job.log) == [0], job.output()
    assert (tmp_path / "graphs").read_text() == "2"  # of one step: that of the last block, too
