"""The public loader: the same global batches on any world size, resumed where they ended."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make import jpeg, write_index, write_tar
from torch.utils.data import DataLoader

from vitscale.data import AugmentConfig, Batch, BatchDataset, load
from vitscale.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"global_batch": 8, "image_size": 8}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 samples, so 12 steps of 8 an epoch."""
    return write_index(tmp_path_factory.mktemp("shards"), [40, 37, 20])


def assert_equal(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert np.array_equal(one.ids, other.ids)


def test_load_yields_batches_without_end(path: Path) -> None:
    first, *others = itertools.islice(load(path, **SIZES), 30)  # two epochs and a half
    assert first.images.shape == (8, 3, 8, 8) and first.images.dtype == torch.uint8
    assert first.labels.shape == (8, 1) and first.labels[:, 0].tolist() == (first.ids % 5).tolist()
    epochs = np.concatenate([first.ids, *(batch.ids for batch in others)]).reshape(-1, 8)
    assert len(set(epochs[:12].flatten())) == len(set(epochs[12:24].flatten())) == 96
    assert epochs[:12].tolist() != epochs[12:24].tolist()


def test_load_starts_at_any_step_and_on_any_rank(path: Path) -> None:
    whole = list(itertools.islice(load(path, **SIZES, seed=3), 20))[13:]
    ranks = [
        itertools.islice(load(path, **SIZES, seed=3, rank=rank, world_size=2, first_step=13), 7)
        for rank in range(2)
    ]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert np.array_equal(np.concatenate([part.ids for part in parts]), expected.ids)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_of_torchrun_gets_its_part_without_asking(
    path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    whole = next(load(path, **SIZES)).ids.tolist()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    part = next(load(path, **SIZES)).ids.tolist()
    assert part == (whole[4:] if int(rank) else whole[:4])
    assert next(iter(BatchDataset(path, **SIZES))).ids.tolist() == part
    assert next(load(path, **SIZES, rank=0, world_size=1)).ids.tolist() == whole


def test_a_pass_over_the_dataset_is_an_epoch(path: Path) -> None:
    dataset = BatchDataset(path, **SIZES)
    passes = [*dataset, *dataset]
    assert dataset.steps_per_epoch == 12 and dataset.step == 24
    assert_equal(passes, list(itertools.islice(load(path, **SIZES), 24)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_is_resumed_in_the_midst_of_an_epoch(path: Path, num_workers: int) -> None:
    dataset = BatchDataset(path, **SIZES, num_workers=num_workers)
    before = list(itertools.islice(dataset, 5))
    assert len(before) == 5
    state = json.loads(json.dumps(dataset.state_dict()))
    resumed = BatchDataset(path, **SIZES)
    resumed.load_state_dict(state)
    expected = list(itertools.islice(load(path, **SIZES), 24))
    assert_equal([*resumed], expected[5:12])
    assert_equal([*resumed], expected[12:])


def test_the_state_of_another_order_is_refused(path: Path, tmp_path: Path) -> None:
    state = BatchDataset(path, **SIZES).state_dict()
    BatchDataset(path, **SIZES, rank=1, world_size=2).load_state_dict(state)
    other = write_index(tmp_path, [96])
    for dataset in (
        BatchDataset(path, **SIZES, seed=1),
        BatchDataset(path, global_batch=16, image_size=8),
        BatchDataset(other, **SIZES),
    ):
        with pytest.raises(ConfigError, match="the state is of another data set or another order"):
            dataset.load_state_dict(state)


def test_a_dataloader_passes_batches_on_but_has_no_workers(path: Path) -> None:
    through = list(DataLoader(BatchDataset(path, **SIZES), batch_size=None))
    assert_equal(through, list(BatchDataset(path, **SIZES)))
    workers = DataLoader(BatchDataset(path, **SIZES), batch_size=None, num_workers=1)
    with pytest.raises(ConfigError, match="pass num_workers to it, and 0 to the DataLoader"):
        next(iter(workers))


def test_shards_need_no_index(path: Path) -> None:
    dataset = BatchDataset(f"{path.parent}/train-*.tar", **SIZES)
    assert sorted({label for batch in dataset for label in batch.labels[:, 0].tolist()}) == [0, 1, 2, 3, 4]


def test_a_replaced_sample_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        (f"s{n}.{kind}", jpeg(n) if kind == "jpg" else b"0") for n in range(16) for kind in ("jpg", "cls")
    ]
    members[6] = ("s3.jpg", jpeg(3)[:100])
    write_tar(tmp_path / "a.tar", members)
    sentences = [sentence for batch in BatchDataset(tmp_path / "a.tar", **SIZES) for sentence in batch.bad]
    assert len(sentences) == 1 and "sample s3" in sentences[0]
    assert [record.getMessage() for record in caplog.records] == [f"a sample was replaced: {sentences[0]}"]


@pytest.mark.parametrize(
    ("accepted", "refused", "sentence"),
    [
        ({}, {"global_batch": 0}, "global_batch 0 must be above 0"),
        ({}, {"image_size": 0}, "image_size 0 must be above 0"),
        ({"rank": 1, "world_size": 2}, {"rank": 2, "world_size": 2}, "rank 2 must be from 0 to world_size"),
        ({"rank": 0}, {"rank": 1}, "= 0; pass both, or neither if a launcher sets RANK and WORLD_SIZE"),
        ({"world_size": 4}, {"world_size": 3}, "3 processes cannot share 8 lanes"),
        ({"first_step": 5}, {"first_step": -1}, "first_step -1 .* must not be negative"),
        ({"augment": AugmentConfig(repeats=2)}, {"augment": AugmentConfig(mixup=0.2)}, "set them to 0"),
        (
            {"global_batch": 32, "augment": AugmentConfig(repeats=2)},
            {"global_batch": 33, "augment": AugmentConfig(repeats=2)},
            "^global_batch 33 is not a multiple of augment.repeats 2; use 32$",
        ),
        (
            {"global_batch": 96},
            {"global_batch": 98},
            "97 samples to train on, fewer than one",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    path: Path, accepted: dict, refused: dict, sentence: str
) -> None:
    load(path, **{**SIZES, **accepted})
    with pytest.raises(ConfigError, match=sentence):
        load(path, **{**SIZES, **refused})


def test_a_missing_shard_is_found_at_the_start(tmp_path: Path) -> None:
    path = write_index(tmp_path, [20, 20])
    load(path, **SIZES)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is in the index but not there"):
        load(path, **SIZES)


def test_the_loop_of_the_documentation_trains(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "data.md").read_text().partition("## In your own training loop")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    write_index(tmp_path / "data" / "photos", [140], num_classes=10)
    (tmp_path / "loop.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "state.pt")["data"]["step"] == 5
