"""Eight ranks of the deepspeed launcher make the run of one.

Two ranks of it are in test_ends.py, and those of torchrun, one of which dies, in
test_restarts.py.
"""

from pathlib import Path

import pytest
from multiprocess.job import Job


def test_eight_ranks_make_the_run_of_one(tmp_path: Path, index: Path, sweep: bool) -> None:
    if not sweep:
        pytest.skip("with --sweep: eight processes")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    for other in (whole, job):  # one image a rank
        text = other.config.read_text().replace("lanes = 4", "lanes = 8")
        other.config.write_text(text.replace("micro_batch = 2", "micro_batch = 1"))
    assert whole.start(1) == [0], whole.output()
    assert job.launch("deepspeed", "--num_gpus", "8") == 0, job.output()
    assert job.column("run/world_size") == [8] * 20
    assert job.column("data/digest") == whole.column("data/digest")
    assert job.column("train/loss") == pytest.approx(whole.column("train/loss"), abs=1e-6)
