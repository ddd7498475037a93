"""What one host says of itself, and the exit status of the comparison."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from make import write_index

from vitscale import config as configs
from vitscale import distributed, shared_memory
from vitscale.cluster.preflight import program
from vitscale.data.sources import open_sources
from vitscale.errors import FAILED, MISTAKE
from vitscale.job import derive, open_tasks
from vitscale.stores import attempts
from vitscale.train_config import TrainConfig

CONFIG = """
global_batch = 8
total_steps = 1
model = {variant = "Ti/16", num_classes = 5}
engine = {num_workers = 2}
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setenv("LOCAL_RANK", "0")  # distributed.initialize sets it
    index = write_index(tmp_path / "shards", [40])
    (tmp_path / "run.toml").write_text(CONFIG)
    overrides = (f"run_dir={tmp_path / 'run'}", f"data.index={index}", f"evals.test.test={index}")
    yield [str(tmp_path / "run.toml"), *overrides]
    distributed.shutdown()


def test_shared_memory_is_what_training_will_ask_for(words: list[str]) -> None:
    config = configs.load(TrainConfig, words[:1], words[1:])
    job = derive(config, 1, open_sources(config.data))
    facts = json.loads(program.own_facts(words))
    assert facts["errors"] == []
    assert facts["shm_needed"] == shared_memory.needed(config, 1, open_tasks(job)) > 0


def test_the_first_host_looks_for_the_shards(words: list[str], tmp_path: Path) -> None:
    (shard := tmp_path / "shards" / "train-000000.tar").unlink()
    (error,) = json.loads(program.own_facts(words))["errors"]
    assert str(shard) in error


def test_a_run_directory_that_cannot_be_written_is_named(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (error,) = json.loads(program.own_facts([*words, f"run_dir={tmp_path}/file/run"]))["errors"]
    assert error == f"run_dir {tmp_path}/file/run cannot be written: Not a directory; choose another"


def test_a_folder_in_which_workers_cannot_make_sockets_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("t" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 100)))
    (error,) = json.loads(program.own_facts(words))["errors"]
    assert "data workers cannot make a socket" in error


@pytest.mark.parametrize(
    ("index", "status"), [("gone.json", MISTAKE), ("http://127.0.0.1:9/index.json", FAILED)]
)
def test_a_missing_index_is_a_mistake_and_a_store_that_does_not_answer_is_none(
    words: list[str], index: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS", 1)
    assert program.among_ranks([*words, f"data.index={index}"]) == status
