"""The validation split: the samples whose keys hash low, on any machine; never trained on."""

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make import jpeg, write_index, write_shards, write_tar

from vitscale.data.data_config import DataConfig
from vitscale.data.evalset import EvaluationSet
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream, batches
from vitscale.data.reader import read_samples
from vitscale.data.scan import key_hash
from vitscale.data.sources import Source, check_labels, make_mixture, open_sources
from vitscale.data.split import split_classes, validation_ids
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError, DataError, StoreError


def keys_of(index: Index, ids: np.ndarray) -> set[str]:
    return {sample.key for sample in read_samples(index, ids.tolist())}


def split_keys(index: Index, fraction: float = 0.3) -> set[str]:
    return keys_of(index, validation_ids(index, fraction, "index.json"))


def source_of(index: Index, tmp_path: Path, **changes: object) -> Source:
    index.save(tmp_path / "split.json")
    (source,) = open_sources(
        DataConfig(index=str(tmp_path / "split.json"), validation_fraction=0.3, **changes)  # type: ignore[arg-type]
    )
    return source


def test_a_sample_validates_if_its_keys_hash_is_below_the_fraction(index: Index) -> None:
    keys = [f"s{sample:05d}" for sample in range(97)]
    for fraction in (0.05, 0.3, 0.9):
        low = {key for key in keys if key_hash(key) < fraction * 65_536}
        assert split_keys(index, fraction) == low and 0 < len(low) < 97


def test_the_split_never_changes() -> None:
    """Golden values: with another hash, runs would validate on what they were trained on."""
    assert [key_hash(key) for key in ("s00000", "photos/größe")] == [1450, 6774]


def test_a_larger_fraction_contains_a_smaller_one(index: Index) -> None:
    small, large = (set(validation_ids(index, fraction, "").tolist()) for fraction in (0.1, 0.2))
    assert small < large


def test_neither_cut_nor_order_of_the_shards_nor_workers_nor_a_kill_change_it(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [40, 37, 20])
    splits = [
        split_keys(build_index(shards)),
        split_keys(build_index(shards[::-1], chunk_samples=4, workers=2)),
    ]
    (tmp_path / "journal").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        build_index(shards, journal=tmp_path / "journal", progress=_stop_at(2))
    splits.append(split_keys(build_index(shards, journal=tmp_path / "journal")))
    build_index(shards).save(tmp_path / "index.json")
    splits.append(split_keys(Index.load(str(tmp_path / "index.json"))))
    assert splits[0] and all(split == splits[0] for split in splits)


def _stop_at(last: int):
    def progress(num_done: int, num_shards: int) -> None:
        if num_done == last:
            raise KeyboardInterrupt

    return progress


def stream_of(source: Source, first: int, last: int, rank: int = 0, world_size: int = 1) -> Stream:
    mixture = make_mixture((source,), DataConfig(lanes=4), seed=1, global_batch=8)
    return Stream(
        sources=(source,),
        mixture=mixture,
        view_config=ViewConfig(AugmentConfig(), "simplejpeg", 8, 5),
        lanes=mixture.rank_lanes(rank, world_size),
        first_step=first,
        last_step=last,
    )


@pytest.mark.parametrize(("world_size", "num_workers", "first"), [(1, 2, 0), (2, 0, 5), (4, 0, 13)])
def test_an_epoch_trains_on_the_rest_once_the_same_on_any_layout(
    index: Index, tmp_path: Path, world_size: int, num_workers: int, first: int
) -> None:
    source = source_of(index, tmp_path)
    reference = list(batches(stream_of(source, 0, 20), 0))
    steps = stream_of(source, 0, 1).mixture.steps_per_epoch
    assert steps == (97 - len(source.held_out)) // 8
    epoch = np.concatenate([batch.ids for batch in reference[:steps]]).tolist()
    assert len(set(epoch)) == len(epoch) == 8 * steps
    assert not set(epoch) & set(source.held_out.tolist())
    ranks = [
        list(batches(stream_of(source, first, 20, rank, world_size), num_workers))
        for rank in range(world_size)
    ]
    for step, whole in enumerate(reference[first:]):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)
        assert np.concatenate([rank[step].ids for rank in ranks]).tolist() == whole.ids.tolist()


def test_what_replaces_a_damaged_sample_is_not_of_the_split(tmp_path: Path) -> None:
    members = []
    for sample in range(64):
        image = b"no image" if sample % 2 else jpeg(sample)
        members += [(f"s{sample:05d}.jpg", image), (f"s{sample:05d}.cls", str(sample % 5).encode())]
    index = build_index([str(write_tar(tmp_path / "x.tar", members))], chunk_samples=4)
    source = source_of(index, tmp_path)
    delivered = list(batches(stream_of(source, 0, 30), 0))
    assert sum(len(batch.bad) for batch in delivered) > 50
    assert not {i for batch in delivered for i in batch.ids.tolist()} & set(source.held_out.tolist())


def test_without_the_key_nothing_changes_and_the_hashes_are_not_read(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index.json")
    (keys,) = tmp_path.glob("index.keys.*.npy")
    keys.write_bytes(b"damaged")
    (source,) = open_sources(DataConfig(index=str(tmp_path / "index.json")))
    assert not len(source.held_out) and source.fingerprint() == index.fingerprint()
    assert make_mixture((source,), DataConfig(), seed=1, global_batch=8).steps_per_epoch == 97 // 8


def test_the_split_is_part_of_the_fingerprint(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index.json")
    prints = set()
    for fraction in (0.0, 0.1, 0.3):
        config = DataConfig(index=str(tmp_path / "index.json"), validation_fraction=fraction)
        prints.add(open_sources(config)[0].fingerprint())
    assert len(prints) == 3


def test_an_excluded_sample_is_in_neither_part(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index.json")
    held_out = validation_ids(index, 0.3, "").tolist()
    listed = {"format": "vitscale-exclude", "version": 1, "index_fingerprint": index.fingerprint()}
    (tmp_path / "list.json").write_text(json.dumps({**listed, "ids": sorted({held_out[0], 0, 1, 2})}))
    source = source_of(index, tmp_path, exclude=str(tmp_path / "list.json"))
    assert source.held_out.tolist() == [i for i in held_out if i not in {held_out[0], 0, 1, 2}]
    delivered = {i for batch in batches(stream_of(source, 0, 30), 0) for i in batch.ids.tolist()}
    assert not delivered & {*held_out, 0, 1, 2}


def test_a_missing_or_damaged_file_of_hashes_is_named(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index.json")
    config = DataConfig(index=str(tmp_path / "index.json"), validation_fraction=0.3)
    (keys,) = tmp_path.glob("index.keys.*.npy")
    keys.write_bytes(keys.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{keys.name} does not match its checksum beside .*data.py index"):
        open_sources(config)
    keys.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{keys.name} is empty beside .*data.py index"):
        open_sources(config)
    keys.unlink()
    with pytest.raises(DataError, match=rf"{keys.name} is missing beside .*data.py index"):
        open_sources(config)


def test_an_index_without_hashes_is_refused_with_the_command(index: Index) -> None:
    old = dataclasses.replace(index, key_hashes=None)
    with pytest.raises(DataError, match=r"holds no hashes .* index again: .* --out old/index.json"):
        validation_ids(old, 0.1, "old/index.json")


def test_a_fraction_that_leaves_nothing_is_refused(index: Index) -> None:
    for fraction in (1e-6, 0.9999, 0.999999):
        with pytest.raises(ConfigError, match=f"validation_fraction {fraction} leaves (0|97) of 97 samples"):
            validation_ids(index, fraction, "")
    with pytest.raises(ConfigError, match=r"data.validation_fraction 1.0 must lie in \[0, 1\)"):
        DataConfig(validation_fraction=1.0)


def test_classes_that_a_split_leaves_without_samples_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of classes of two samples, about half have none that validates, and some nothing else."""
    index = Index.load(str(write_index(tmp_path / "shards", [40], num_classes=20)))
    ids = set(validation_ids(index, 0.3, "").tolist())
    held = [{sample in ids for sample in (label, label + 20)} for label in range(20)]
    lacking = split_classes(index, 0.3)
    assert lacking.only_training == [label for label in range(20) if held[label] == {False}] != []
    assert lacking.only_validation == [label for label in range(20) if held[label] == {True}] != []
    config = DataConfig(index=str(tmp_path / "shards" / "index.json"), validation_fraction=0.3)
    with caplog.at_level(logging.WARNING):
        check_labels(open_sources(config), config, 20)
    sentences = [record.getMessage() for record in caplog.records]
    assert len(sentences) == 2
    count = len(lacking.only_training)
    assert (
        f"leaves {count} of 20 classes without validation samples: label {lacking.only_training[0]},"
        in (sentences[0])
    )
    assert "classes without training samples: label" in sentences[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_reads_the_split_with_mapped_labels_and_leaves_out_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    members = []
    for sample in range(64):
        image = jpeg(sample)[:100] if sample % 4 == 0 else jpeg(sample)
        members += [(f"s{sample:05d}.jpg", image), (f"s{sample:05d}.cls", str(sample % 5).encode())]
    index = build_index([str(write_tar(tmp_path / "x.tar", members))], chunk_samples=4)
    (tmp_path / "map.json").write_text("[10, 11, 12, 13, 14]")
    source = source_of(index, tmp_path, label_map=str(tmp_path / "map.json"))
    split = EvaluationSet(index, image_size=8, source=source, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ((images, labels),) = split.batches(np.arange(split.num_samples), 100)
            split.report_left_out()
    held_out = source.held_out.tolist()
    assert split.num_samples == len(images) == len(held_out)
    assert labels[:, 0].tolist() == [-1 if i % 4 == 0 else 10 + i % 5 for i in held_out]
    damaged = [i for i in held_out if i % 4 == 0]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(damaged) and all("left out of the validation" in line for line in warnings)
    assert f"sample s{damaged[0]:05d}" in warnings[0]


def test_labels_that_the_head_lacks_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = Index.load(str(write_index(tmp_path / "shards", [40, 37, 20])))
    split = EvaluationSet(index, image_size=8, source=source_of(index, tmp_path))
    with caplog.at_level(logging.WARNING):
        ((_, labels),) = split.batches(np.arange(split.num_samples), 100, num_classes=4)
        split.report_left_out()
    warnings = [record.getMessage() for record in caplog.records]
    assert set(labels[:, 0].tolist()) == {-1, 0, 1, 2, 3}
    assert len(warnings) == int((labels[:, 0] == -1).sum())
    assert all("label 4 is out of range for model.num_classes 4" in line for line in warnings)


def test_workers_of_an_evaluation_outlive_the_signals_of_a_scheduler(tmp_path: Path) -> None:
    index = Index.load(str(write_index(tmp_path / "shards", [40, 37, 20])))
    images = EvaluationSet(index, image_size=8, num_workers=2)
    batches = images.batches(np.arange(97), 4)
    first = [next(batches), next(batches)]  # one of each worker: both have started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGTERM)
    assert sum(len(part) for part, _ in (*first, *batches)) == 97


KILLER = """
import multiprocessing, os, signal, sys
import numpy as np
from vitscale import command
from vitscale.data.evalset import EvaluationSet

def program():
    images = EvaluationSet.open(sys.argv[1], image_size=8, num_workers=1)
    for number, _ in enumerate(images.batches(np.arange(97), 2)):
        if not number:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return 0

sys.exit(command.run(program))
"""


def test_a_worker_of_an_evaluation_that_is_killed_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: torch raises the error wherever the process happens to be."""
    command = [sys.executable, "-c", KILLER, str(write_index(tmp_path / "shards", [40, 37, 20]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: a data worker of rank 0 was killed, probably for lack of memory; ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_disk_that_does_not_answer_an_evaluation_is_one_sentence(tmp_path: Path, num_workers: int) -> None:
    index = Index.load(str(write_index(tmp_path / "shards", [8])))
    images = EvaluationSet(index, image_size=8, num_workers=num_workers)
    shard = Path(index.shards[0].url)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StoreError, match=rf"^reading {shard}: .*; name a file$"):
        next(images.batches(np.arange(8), 4))
