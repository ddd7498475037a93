"""One reference run, made once for all tests that start real ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.zygote import Zygote
from shard_files import write_index


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 samples: 10 steps of 8 an epoch, so that a kill at step 7 or 14 is in mid-epoch, mid-shard and mid-
    window.
    """
    return write_index(tmp_path_factory.mktemp("shards"), [30, 33, 20])


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Job:
    """20 steps on 2 ranks at ZeRO 1, fp32, two micro steps each, no data workers."""
    job = Job(tmp_path_factory.mktemp("uninterrupted"), index)
    assert job.start(2) == [0, 0], job.output()
    return job


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """One process for all tests that start many ranks."""
    zygote = Zygote()
    yield zygote
    zygote.close()
