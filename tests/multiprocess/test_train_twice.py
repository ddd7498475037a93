"""train() can be called many times in one process, with the same config and with others."""

from pathlib import Path

from multiprocess.job import Job
from multiprocess.rank_runs import train_twice
from multiprocess.zygote import Zygote


def test_two_runs_in_one_process_equal_two_processes(
    tmp_path: Path, index: Path, uninterrupted: Job, zygote: Zygote
) -> None:
    first, second, alone = (Job(tmp_path / name, index) for name in ("first", "second", "alone"))
    for job in (second, alone):
        text = job.config.read_text()
        for old, new in (
            ("seed = 7", "seed = 8"),
            ("depth = 2", "depth = 1"),
            ("num_workers = 0", "num_workers = 1"),
        ):
            assert old in text
            text = text.replace(old, new)
        job.config.write_text(text)
    assert zygote.run(2, train_twice, first.config, second.config, log=first.log) == [0, 0], first.output()
    assert zygote.train(alone, 2) == [0, 0], alone.output()
    for column in ("step", "train/loss", "train/grad_norm", "data/digest"):
        assert first.column(column) == uninterrupted.column(column)
        assert second.column(column) == alone.column(column)
    assert first.column("train/loss") != second.column("train/loss")
