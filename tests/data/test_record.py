"""What a run keeps of its indexes, and which other indexes that record accepts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from make import jpeg, write_tar

from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.record import FILE_NAME, DataRecord
from vitscale.data.samples import SampleKeys

KEYS = SampleKeys(label_key="fine", classes={"cat": 0, "dog": 1})
PERMUTED = {"cat": 1, "dog": 0}
SAMPLES = 8


def made(folder: Path, keys: SampleKeys = KEYS, extra: str = "") -> Index:
    """Shards of two chunks. extra: the first sample's label, in place of its own."""
    members = []
    for sample in range(SAMPLES):
        labels = {"fine": ("cat", "dog")[sample % 2], "coarse": "cat"}
        if extra and sample == 0:
            labels["fine"] = extra
        members += [(f"s{sample}.jpg", jpeg(sample)), (f"s{sample}.json", json.dumps(labels).encode())]
    return build_index([str(write_tar(folder / "train.tar", members))], keys=keys, chunk_samples=4)


def kept(folder: Path, index: Index) -> DataRecord:
    """The record of a run with this index, read again."""
    DataRecord.of([index]).save(folder)
    record = DataRecord.load(folder)
    assert record
    return record


def of_earlier_commits(folder: Path, index: Index) -> DataRecord:
    """The same as it was before it had keys."""
    kept(folder, index)
    with np.load(folder / FILE_NAME) as arrays:
        older = {name: array for name, array in arrays.items() if not name.startswith("keys_")}
    np.savez(folder / FILE_NAME, **older)
    record = DataRecord.load(folder)
    assert record and record.sources[0].keys is None
    return record


@pytest.mark.parametrize(
    ("changed", "clause"),
    [
        ({}, ""),
        ({"label_key": "coarse"}, "label_key 'fine', now with 'coarse'"),
        ({"image_key": "jpg"}, "image_key 'jpg;jpeg;png;webp', now with 'jpg'"),
        ({"classes": PERMUTED}, "class 'cat' as label 0, now with class 'cat' as label 1"),
        ({"classes": {"cat": 0}}, "class 'dog' as label 1, now with no class 'dog'"),
        ({"classes": {**KEYS.classes, "3": 1}}, "no class '3', now with class '3' as label 1"),
        ({"classes": {**KEYS.classes, "fox": 2}}, ""),
    ],
)  # fmt: skip
def test_an_index_of_other_labels_is_another_one(tmp_path: Path, changed: dict, clause: str) -> None:
    record = kept(tmp_path, made(tmp_path))
    now = made(tmp_path, dataclasses.replace(KEYS, **changed))
    assert record.change([now], []) == (clause and f"the index was made with {clause}")


@pytest.mark.parametrize("changed", [{"label_key": "coarse"}, {"classes": PERMUTED}])
def test_records_of_earlier_commits_notice_other_labels_too(tmp_path: Path, changed: dict) -> None:
    index = made(tmp_path)
    record = of_earlier_commits(tmp_path, index)
    assert record.change([index], []) == ""
    change = record.change([made(tmp_path, dataclasses.replace(KEYS, **changed))], [])
    assert (
        change == "no sample has changed, so the index was made with another image_key, label_key or classes"
    )
    assert record.followed_by([index]).sources[0].keys == KEYS  # it says from now on


def test_what_was_replaced_is_read_for_another_index_only(tmp_path: Path) -> None:
    index = made(tmp_path)
    record, replaced = kept(tmp_path, index), iter(["a", "b"])
    assert record.change([index], replaced) == "" and next(replaced) == "a"
    record.change([made(tmp_path, extra="dog")], replaced)
    assert list(replaced) == []


def test_damage_that_was_fixed_is_no_other_label(tmp_path: Path) -> None:
    broken, fixed = made(tmp_path, extra="a fox"), made(tmp_path)
    assert broken.num_damaged == 1
    for record in (kept(tmp_path, broken), of_earlier_commits(tmp_path, broken)):
        assert record.change([fixed], []) == ""
