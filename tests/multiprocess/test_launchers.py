"""torchrun and the deepspeed launcher start the run that the other tests start by hand."""

from pathlib import Path

import pytest
from multiprocess.job import Job


@pytest.mark.parametrize(
    ("launcher", "option"), [("torchrun", "--nproc_per_node"), ("deepspeed", "--num_gpus")]
)
def test_a_launcher_starts_the_same_run(
    tmp_path: Path, index: Path, uninterrupted: Job, launcher: str, option: str
) -> None:
    job = Job(tmp_path, index)
    assert job.launch(launcher, option, "2") == 0, job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")
