"""Shards and their index: what is read back, and that no damage passes for the end of data."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from shard_files import jpeg, write_shards, write_tar

from vitscale.config import ConfigError
from vitscale.data.index import DataError, Index, build_index, check_shards
from vitscale.data.reader import read_chunk, read_samples
from vitscale.data.samples import BadSample, RawSample, parse_labels, split_name
from vitscale.data.tar import TarDamage, walk
from vitscale.data.verify import verify_index


def test_samples_come_back_by_id_in_any_order(index: Index) -> None:
    ids = [0, 3, 4, 39, 40, 76, 77, 96, 5]
    samples = list(read_samples(index, ids))
    assert [s.key for s in samples] == [f"s{i:05d}" for i in ids]
    assert [s.labels for s in samples] == [(i % 5,) for i in ids]
    assert [s.image for s in samples] == [jpeg(i) for i in ids]


def test_the_index_survives_saving_and_moving_the_folder(tmp_path: Path, index: Index) -> None:
    moved = (tmp_path / "shards").rename(tmp_path / "elsewhere")
    again = Index.load(str(moved / "index.json"))
    assert again.fingerprint() == index.fingerprint()
    assert next(iter(read_samples(again, [50]))).key == "s00050"


def test_counts_and_labels_are_in_the_index(index: Index) -> None:
    assert index.num_samples == 97
    assert len(index.chunks) == index.layout.num_chunks == 10 + 10 + 5
    assert index.label_counts == {0: 20, 1: 20, 2: 19, 3: 19, 4: 19}
    assert list(verify_index(index)) == []


def test_long_names_and_pax_headers_are_read(tmp_path: Path) -> None:
    name = "deep/" * 60 + "ünïcode"
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            for extension, content in ((".jpg", jpeg(0)), (".cls", b"1")):
                info = tarfile.TarInfo(name + extension)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        index = build_index([str(path)])
        assert next(iter(read_samples(index, [0]))).key == name


def cut_mid_data(data: bytes, at: int) -> bytes:
    return data[: at + 512 + 100]


def cut_at_boundary(data: bytes, at: int) -> bytes:
    return data[:at]


def cut_mid_header(data: bytes, at: int) -> bytes:
    return data[: at + 100]


def cut_between_files_of_a_sample(data: bytes, at: int) -> bytes:
    size = int(data[at + 124 : at + 135], 8)
    return data[: at + 512 + -(-size // 512) * 512]


def zero_a_header(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(512) + data[at + 512 :]


def flip_a_header_byte(data: bytes, at: int) -> bytes:
    return data[: at + 3] + bytes([data[at + 3] ^ 1]) + data[at + 4 :]


DAMAGES = [
    cut_mid_data,
    cut_at_boundary,
    cut_mid_header,
    cut_between_files_of_a_sample,
    zero_a_header,
    flip_a_header_byte,
]


def header_of(path: Path, key: str) -> int:
    with open(path, "rb") as file:
        return next(m.offset for m in walk(file, whole=True) if m.name == f"{key}.jpg")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_when_indexing_and_found_when_verifying(tmp_path: Path, damage) -> None:
    path = Path(write_shards(tmp_path, [20])[0])
    index = build_index([str(path)], chunk_samples=4)
    path.write_bytes(damage(path.read_bytes(), header_of(path, "s00010")))
    with pytest.raises(DataError, match=r"train-000000\.tar: byte [\d,]+: .*10 whole samples before it"):
        build_index([str(path)])
    kept = build_index([str(path)], chunk_samples=4, allow_damaged=True)
    assert [s.key for s in read_samples(kept, range(kept.num_samples))] == [f"s{i:05d}" for i in range(10)]
    assert any("train-000000.tar" in sentence for sentence in verify_index(index))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_after_indexing_costs_only_the_chunks_it_touches(tmp_path: Path, damage) -> None:
    path = Path(write_shards(tmp_path, [20])[0])
    index = build_index([str(path)], chunk_samples=4)
    path.write_bytes(damage(path.read_bytes(), header_of(path, "s00010")))
    chunks = [read_chunk(index, chunk) for chunk in range(5)]
    assert [len(chunk) for chunk in chunks] == [4] * 5
    assert all(isinstance(sample, RawSample) for sample in chunks[0] + chunks[1])
    assert all(isinstance(sample, BadSample) for sample in chunks[2])
    assert all("are not those that were indexed" in sample.reason for sample in chunks[2])
    if damage in (zero_a_header, flip_a_header_byte):
        assert all(isinstance(sample, RawSample) for sample in chunks[3] + chunks[4])


def test_one_flipped_bit_of_an_image_or_a_label_is_noticed_and_named(tmp_path: Path) -> None:
    """Tar has no checksum over data, and libjpeg decodes most flipped bits to another picture in silence."""
    path = Path(write_shards(tmp_path, [20])[0])
    index = build_index([str(path)], chunk_samples=4)
    whole = path.read_bytes()
    for place in (header_of(path, "s00005") + 512 + 300, header_of(path, "s00006") - 512):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(bytes(data))
        samples = [sample for chunk in range(5) for sample in read_chunk(index, chunk)]
        assert [isinstance(sample, BadSample) for sample in samples] == [False] * 4 + [True] * 4 + [
            False
        ] * 12
        assert [sample.key for sample in samples] == [f"s{n:05d}" for n in range(20)]
        assert list(verify_index(index)) == [
            f"{path}: is not the shard that was indexed: its checksum differs"
        ]


def test_a_shard_that_was_replaced_by_one_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [8])[0])
    index = build_index([str(path)], chunk_samples=4)
    members = [
        (f"s{n:05d}.{kind}", data) for n in range(8) for kind, data in (("jpg", jpeg(n)), ("cls", b"4"))
    ]
    size = path.stat().st_size
    write_tar(path, members)
    assert path.stat().st_size == size
    check_shards(index)  # nothing to see from outside
    assert all(isinstance(sample, BadSample) for chunk in range(2) for sample in read_chunk(index, chunk))


def test_samples_that_cannot_be_used_are_indexed_counted_and_named(tmp_path: Path) -> None:
    good = [("a.jpg", jpeg(0)), ("a.cls", b"0")]
    bad = [
        [("text.jpg", b"not an image"), ("text.cls", b"1")],
        [("nolabel.jpg", jpeg(1))],
        [("word.jpg", jpeg(1)), ("word.cls", b"cat")],
        [("evil.jpg", jpeg(1)), ("evil.cls", b"1"), ("evil.pkl", b"x")],
    ]
    path = write_tar(tmp_path / "x.tar", [*good, *(member for sample in bad for member in sample)])
    index = build_index([str(path)])
    assert index.num_samples == 5 and index.num_damaged == 4
    for sentence, part in zip(index.damage, ("not a JPEG", "0 label files", "labels", r".pkl"), strict=True):
        assert part in sentence
    with pytest.raises(DataError, match="sample text"):
        list(read_samples(index, [1]))


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg(0)), ("a.cls", b"0"), ("b.jpg", jpeg(1)), ("b.cls", b"0")]
    path = write_tar(tmp_path / "x.tar", [*members, ("a.jpg", jpeg(2)), ("a.cls", b"1")])
    assert "a: its key stands twice" in build_index([str(path)]).damage[0]


def test_empty_and_missing_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(DataError, match="ends without its end mark"):
        build_index([str(tmp_path / "zero.tar")])
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar is empty"):
        build_index([str(tmp_path / "empty.tar")])
    with pytest.raises(DataError, match="does not exist"):
        build_index([str(tmp_path / "none.tar")])


def test_a_shard_changed_after_indexing_is_named_before_training(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [8, 8])
    index = build_index(paths)
    check_shards(index)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-000001\.tar has [\d,]+ bytes, the index says"):
        check_shards(index)
    Path(paths[1]).unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is in the index but not there"):
        check_shards(index)


def test_a_damaged_or_missing_index_is_refused(tmp_path: Path, index: Index) -> None:
    array = tmp_path / "shards" / "index.chunks.npy"
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(bytes(data))
    with pytest.raises(DataError, match="does not match its checksum"):
        Index.load(str(tmp_path / "shards" / "index.json"))
    with pytest.raises(DataError, match="is missing"):
        Index.load(str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DataError, match="is not an index"):
        Index.load(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["shards"].pop(0),
        lambda values: values["shards"].clear(),
        lambda values: values.pop("shards"),
        lambda values: values["shards"][0].update(num_samples=10**9),
        lambda values: values["shards"][0].update(num_samples="x"),
        lambda values: values["shards"][0].update(more=1),
        lambda values: values["shards"][0].update(url=5),
        lambda values: values.update(chunk_samples=0),
        lambda values: values.update(label_counts=[1]),
        lambda values: values["chunks"].pop("checksum"),
    ],
)
def test_an_edited_index_is_refused(tmp_path: Path, index: Index, edit) -> None:
    path = tmp_path / "shards" / "index.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"make it with: python tools/data\.py index"):
        Index.load(str(path))


def test_pipe_urls_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipe: is not allowed"):
        build_index(["pipe:cat /etc/passwd"])


def test_labels_are_read_from_cls_and_json() -> None:
    assert parse_labels("cls", b"7\n") == (7,)
    assert parse_labels("cls", b"3 17,4") == (3, 17, 4)
    with pytest.raises(ValueError, match="whole numbers from 0"):
        parse_labels("cls", b"1_0")
    assert parse_labels("json", b'{"labels": [2, 5]}') == (2, 5)
    assert parse_labels("json", b'{"label": 2}') == (2,)
    for bad in (b"-1", b"1.5", b"", b"a"):
        with pytest.raises(ValueError):
            parse_labels("cls", bad)
    with pytest.raises(ValueError):
        parse_labels("json", b"[" * 100_000)


def test_keys_end_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("a.b/n01.x.JPG") == ("a.b/n01", "x.jpg")


def test_a_compressed_or_linked_member_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with open(path, "rb") as file, pytest.raises(TarDamage, match="regular files only"):
        list(walk(file, whole=True))
