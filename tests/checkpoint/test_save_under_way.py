"""What becomes of a save that is under way when training fails."""

import threading
from pathlib import Path

import pytest

from vitscale.checkpoint import save
from vitscale.checkpoint.save import Saver
from vitscale.checkpoint.store import CheckpointConfig, Home
from vitscale.errors import RankLost


@pytest.mark.parametrize(
    ("error", "finishes"),
    [
        (ZeroDivisionError("a bug on this rank"), True),
        (RankLost("rank 1 has died"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:558] Connection closed by peer"), False),
    ],
)
def test_it_is_finished_unless_a_rank_is_lost_for_which_it_may_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, finishes: bool
) -> None:
    monkeypatch.setattr(save, "COMMIT_SECONDS", 0.01)
    others_come = threading.Event()
    writer = threading.Thread(target=others_come.wait, daemon=True)
    saver = Saver(Home(tmp_path), CheckpointConfig())
    saver._thread = writer
    writer.start()
    timer = threading.Timer(0.3, others_come.set)
    timer.start()
    with pytest.raises(type(error)), saver:
        raise error
    assert writer.is_alive() is not finishes
    timer.join()


def test_the_best_of_an_evaluation_is_named_behind_the_save_that_it_does_not_wait_for(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:09d}").mkdir()
    config, written = CheckpointConfig(keep_last=1, keep_best="eval/a/top1"), threading.Event()
    saver = Saver(Home(tmp_path), config, best_of=lambda steps: 2 if 2 in steps else None)
    saver._thread = threading.Thread(target=written.wait, daemon=True)
    saver._thread.start()
    saver.keep_best()
    saver._thread.join(0.3)
    assert saver._thread.is_alive() and not (tmp_path / "best").exists()
    written.set()
    saver.wait()
    assert (tmp_path / "best").read_text() == "step-000000002\n"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000002", "step-000000003"]
