"""A run continues from a checkpoint that was cut again for another number of ranks."""

from pathlib import Path

from multiprocess.job import Job
from multiprocess.zygote import Zygote

from tools.checkpoint import main


def test_a_resharded_checkpoint_is_resumed_bit_for_bit(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job, step = Job(tmp_path, index), "step-000000018"
    source, out = (run / "checkpoints" / step for run in (uninterrupted.run_dir, job.run_dir))
    assert main(["reshard", str(source), str(out), "--world", "3"]) == 0
    assert main(["diff", str(source), str(out), "--states"]) == 0
    assert zygote.train(job, 2) == [0, 0], job.output()
    for name in ("step", "train/loss", "train/grad_norm", "data/digest"):
        assert job.column(name) == uninterrupted.column(name)[18:]
    assert main(["diff", str(uninterrupted.run_dir), str(job.run_dir), "--states"]) == 0
