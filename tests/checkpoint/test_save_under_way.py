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
    saver._saves.append(save._Save(step=3, thread=writer))
    writer.start()
    timer = threading.Timer(0.3, others_come.set)
    timer.start()
    with pytest.raises(type(error)), saver:
        raise error
    assert writer.is_alive() is not finishes
    timer.join()
