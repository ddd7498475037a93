"""The files of an index: read as they were written, or refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from vitscale.data.index import Index
from vitscale.data.samples import SampleKeys
from vitscale.errors import DataError


def test_a_damaged_or_missing_index_is_refused(tmp_path: Path, index: Index) -> None:
    (array,) = (tmp_path / "shards").glob("index.chunks.*.npy")
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(bytes(data))
    with pytest.raises(DataError, match="does not match its checksum"):
        Index.load(str(tmp_path / "shards" / "index.json"))
    with pytest.raises(DataError, match="is missing"):
        Index.load(str(tmp_path / "nothing.json"))
    foreign = [  # of MDS, litData and wids
        '{"version": 2, "shards": [{"format": "mds", "samples": 13}]}',
        '{"chunks": [{"chunk_size": 13, "filename": "chunk-0-0.bin"}], "config": {}}',
        '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "a.tar"}]}',
    ]
    for other in ("[1]", '["cat", "dog"]', '{"format": "vitscale-duplicates", "version": 1}', *foreign):
        (tmp_path / "bad.json").write_text(other)
        sentence = r"is not an index of vitscale, .*; of WebDataset tars, make one with: .*\(MDS\)"
        with pytest.raises(DataError, match=sentence) as refused:
            Index.load(str(tmp_path / "bad.json"))
        assert "--out" not in str(refused.value)  # it would replace what is not ours


def test_an_index_whose_chunks_reach_beyond_their_shard_is_refused(tmp_path: Path, index: Index) -> None:
    chunks = index.chunks.astype([("blocks", "<i8"), ("checksum", "<u2")])
    chunks["blocks"][:2] += (10**9, -(10**9))
    dataclasses.replace(index, chunks=chunks).save(tmp_path / "shards" / "index.json")
    with pytest.raises(DataError, match="are not those of"):
        Index.load(str(tmp_path / "shards" / "index.json"))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["shards"].pop(0),
        lambda values: values["shards"].clear(),
        lambda values: values.pop("shards"),
        lambda values: values["shards"][0].update(num_samples=10**9),
        lambda values: values["shards"][0].update(num_samples="x"),
        lambda values: values["shards"][0].update(num_bytes=values["shards"][0]["data_bytes"] - 1),
        lambda values: values["shards"][0].update(more=1),
        lambda values: values["shards"][0].update(url=5),
        lambda values: values.update(chunk_samples=0),
        lambda values: values.update(label_counts=[1]),
        lambda values: values["chunks"].pop("checksum"),
        lambda values: values["label_counts"].update({"0": {}}),
        lambda values: values.update(max_labels="x"),
        lambda values: values.update(num_damaged=None),
        lambda values: values.update(shared_labels=0.5),
        lambda values: values.update(passed_over=[]),
        lambda values: values.update(damage="cat", repeated_keys=[1, 1]),
        lambda values: values.update(reasons={"cut": [1, 1]}),
        lambda values: values.update(hash_ranges={"0": ["0", "5"]}),
        lambda values: values.update(lone_samples={"9": [[]]}),
        lambda values: values["keys"].update(classes=5),
        lambda values: values["keys"].update(classes={"cat": "0"}),
        lambda values: values["shards"][0].update(checksum=[]),
    ],
)
def test_an_edited_index_without_a_checksum_is_refused(tmp_path: Path, index: Index, edit) -> None:
    path = tmp_path / "shards" / "index.json"
    values = json.loads(path.read_text())
    del values["checksum"]  # as earlier commits wrote it
    path.write_text(json.dumps(values))
    assert Index.load(str(path)).fingerprint() == index.fingerprint()
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"make (it|one) with: python tools/data\.py index"):
        Index.load(str(path))


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["keys"]["classes"].update(dog=0),
        lambda values: values["label_counts"].update({"0": 1}),
        lambda values: values["shards"][0].update(checksum="f00"),
        lambda values: values.update(num_damaged=3, more=1),
        lambda values: values.update(checksum=None),
    ],
)
def test_an_index_with_another_checksum_is_refused(tmp_path: Path, index: Index, edit) -> None:
    """Of what it says, only where its shards are may change."""
    path = tmp_path / "shards" / "index.json"
    dataclasses.replace(index, keys=SampleKeys(classes={"cat": 0, "dog": 1})).save(path)
    values = json.loads(path.read_text())
    for shard in values["shards"]:
        shard["url"] = f"s3://bucket/{shard['url']}"
    path.write_text(json.dumps(values, indent=2))
    assert Index.load(str(path)).keys.classes == {"cat": 0, "dog": 1}
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"is damaged: its checksum does not match; make it with: python"):
        Index.load(str(path))
