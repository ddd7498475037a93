"""Any checkpoint of a run becomes a finished model by tools/checkpoint.py cooldown."""

import shutil
from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from tools.checkpoint import main
from vitscale.config import load
from vitscale.metrics.expect import ExpectConfig
from vitscale.train_config import TrainConfig


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_checkpoint_is_continued_to_a_rate_of_zero_and_its_run_untouched(
    tmp_path: Path, index: Path, zygote: Zygote, capsys: pytest.CaptureFixture[str], decay: str
) -> None:
    trunk = Job(tmp_path / "trunk", index)
    bands = 'expect={source="here", bands={"train/loss"=[[1, 0.0, 9.0], [20, 0.0, 9.0]]}}'
    options = ("schedule.decay=" + decay, "total_epochs=2", bands)
    assert zygote.train(trunk, 2, *options) == [0, 0], trunk.output()
    before = contents(trunk.run_dir)
    checkpoint = trunk.run_dir / "checkpoints" / "step-000000018"
    done = Job(tmp_path / "done", index)
    assert main(["cooldown", str(checkpoint), str(done.run_dir), "--steps", "4"]) == 0
    written, line, needed = capsys.readouterr().out.splitlines()
    assert Path(written) == done.run_dir / "config.toml" and line.endswith(f"launch/train.py {written}")
    assert "let checkpoint.keep_every_steps keep that, or name a copy" in needed
    assert load(TrainConfig, [written]).expect == ExpectConfig()
    done.config = Path(written)
    assert zygote.train(done, 1) == [0], done.output()
    rate, at_18 = done.column("train/lr"), trunk.column("train/lr")[17]
    assert done.column("step") == [19, 20, 21, 22]
    assert rate == pytest.approx([at_18 * share for share in (0.75, 0.5, 0.25, 0.0)])
    assert done.column("data/digest")[:2] == trunk.column("data/digest")[18:20]
    assert contents(trunk.run_dir) == before
    assert zygote.train(trunk, 1, *options, "total_epochs=2.2") == [0], trunk.output()


def test_what_cannot_be_cooled_down_is_refused(
    tmp_path: Path, uninterrupted: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = shutil.copytree(uninterrupted.run_dir, tmp_path / "trunk")
    for arguments, sentence in (
        ([trunk, tmp_path / "a", "--steps=4"], "the learning rate at"),
        ([trunk / "checkpoints" / "step-000000018", tmp_path / "a", "--steps=0"], "--steps 0 must be 1 or"),
        ([trunk / "checkpoints" / "step-000000018", trunk, "--steps=4"], "exists and is not overwritten"),
        ([trunk / "checkpoints" / "step-000000018", "caf\udce9", "--steps=4"], "udce9' is not UTF-8; rename"),
        ([tmp_path / "none", tmp_path / "a", "--steps=4"], "is not a checkpoint"),
    ):
        assert main(["cooldown", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
        assert not (tmp_path / "a").exists()
