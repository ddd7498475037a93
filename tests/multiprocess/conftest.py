"""One reference run, and one parent of forked ranks, for all tests that start real ranks.

Which way to start them:

    to show                                  use
    -------------------------------------    ----------------------------------------------
    how the command behaves as a process:    job.start(2, ...) or job.ranks(2, ...):
    exit status, signals, a run's lock       launch/train.py, some seconds a start
    that a launcher's variables are read     job.launch("torchrun", ...)
    anything else that a run does            zygote.train(job, 2, ..., event=Kill(...)):
                                             the same main() in a fork, well under a second
    what a function does on every rank       zygote.run(2, function, ..., log=job.log)
    the same on a GPU                        Fresh().run(...): new processes
    what takes two machines                  two_hosts(folder) or two_node_slurm(folder)

Kills and stops at a chosen place are events of ranks.py. They count batches, or the effects of
a save; none waits for a time to pass.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from make import write_index
from multiprocess.job import Job
from multiprocess.zygote import Zygote


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 samples: 10 steps of 8 an epoch. Step 7 is in mid-epoch, mid-shard and mid-window."""
    return write_index(tmp_path_factory.mktemp("shards"), [30, 33, 20])


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Job:
    """20 steps of the real command: 2 ranks, ZeRO 1, fp32, two micro steps each, no workers."""
    job = Job(tmp_path_factory.mktemp("uninterrupted"), index)
    assert job.start(2) == [0, 0], job.output()
    return job


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The one process that forks the ranks of all tests."""
    zygote = Zygote()
    yield zygote
    zygote.close()
