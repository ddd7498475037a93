"""A store in which a stranger, who may read, write and delete everything, says nothing."""

import datetime
import logging

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from vitscale.guard.sealed_store import SealedStore


def open_store() -> tuple[TCPStore, TCPStore]:
    """The store of a job, and a stranger's connection to it."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, TCPStore("localhost", store.port, is_master=False)


def test_what_a_rank_writes_all_ranks_read() -> None:
    ours, theirs = (SealedStore(store, b"secret") for store in open_store())
    assert theirs.get("stop") is None
    for text in ("", "é \U0001f642", "x" * 100_000):
        ours.set("stop", text)
        assert ours.get("stop") == text  # the server has it: a set does not wait for it
        assert theirs.get("stop") == text
    ours.set("place/1", "there")
    assert ours.get("place/1") == "there"
    assert theirs.get_all(["place/1", "stop"]) == ["there", "x" * 100_000]
    theirs.wait(["stop"], datetime.timedelta(seconds=1))
    with pytest.raises(RuntimeError):
        theirs.wait(["over"], datetime.timedelta(seconds=0.01))


def test_what_a_stranger_writes_is_absent(caplog: pytest.LogCaptureFixture) -> None:
    store, stranger = open_store()
    ours = SealedStore(store, b"secret")
    ours.set("place/0", "here")
    ours.set("place/1", "there")
    assert ours.get("place/1") == "there"
    first, second = sorted(stranger.list_keys())
    stranger.set("stop", "maintenance")
    guessed = SealedStore(stranger, b"guess")
    guessed.set("stop", "maintenance")
    assert guessed.get("stop") == "maintenance"
    assert ours.get("stop") is None and not caplog.records
    kept = stranger.get(first)
    for value in (b"", b"x", b"\xff" * 40, kept + b"x", stranger.get(second)):  # also that of another name
        stranger.set(first, value)
        assert stranger.get(first) == value
        assert ours.get_all(["place/0", "place/1"]).count(None) == 1
    stranger.set(first, kept)
    assert stranger.get(first) == kept
    assert ours.get_all(["place/0", "place/1"]) == ["here", "there"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
