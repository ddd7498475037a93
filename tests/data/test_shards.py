"""Shards and their index: what is read back, and that damage is never taken for their end."""

import resource
import tarfile
from pathlib import Path

import pytest
from make import jpeg, write_shards, write_tar

from vitscale.curate.stats import doubts
from vitscale.curate.verify import verify_index
from vitscale.data.index import Index, check_shards, damaged_chunks
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_chunk, read_samples
from vitscale.data.record import DataRecord
from vitscale.data.samples import (
    BadSample,
    RawSample,
)
from vitscale.data.tar import walk
from vitscale.errors import ConfigError, DataError, StoreError
from vitscale.stores import storage


def test_samples_come_back_by_id_in_any_order(index: Index) -> None:
    ids = [0, 3, 4, 39, 40, 76, 77, 96, 5]
    samples = list(read_samples(index, ids))
    assert [sample.key for sample in samples] == [f"s{i:05d}" for i in ids]
    assert [sample.labels for sample in samples] == [(i % 5,) for i in ids]
    assert [sample.image for sample in samples] == [jpeg(i) for i in ids]
    assert {sample.extension for sample in samples} == {"jpg"}


def test_the_index_survives_saving_and_moving_the_folder(tmp_path: Path, index: Index) -> None:
    moved = (tmp_path / "shards").rename(tmp_path / "elsewhere")
    again = Index.load(str(moved / "index.json"))
    assert again.fingerprint() == index.fingerprint()
    assert next(iter(read_samples(again, [50]))).key == "s00050"


def test_an_index_that_is_replaced_stays_readable_until_the_new_one_is_whole(
    tmp_path: Path, index: Index
) -> None:
    path = tmp_path / "shards" / "index.json"
    others = [build_index([shard.url for shard in index.shards[:count]]) for count in (1, 2)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # arrays are smaller, index.json is larger
    try:
        with pytest.raises(OSError, match="File too large"):
            others[0].save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Index.load(str(path)).num_samples == 97
    before = Index.load(str(path))
    others[0].save(path)
    assert Index.load(str(path)).num_samples == 40
    assert before.key_hashes and len(before.key_hashes.read()) == 97
    others[1].save(path)
    assert len(list(path.parent.glob("*.npy"))) == 4  # without those of the first index


def test_counts_and_labels_are_in_the_index(index: Index) -> None:
    assert index.num_samples == 97
    assert len(index.chunks) == index.layout.num_chunks == 10 + 10 + 5
    assert index.label_counts == {0: 20, 1: 20, 2: 19, 3: 19, 4: 19}
    assert list(verify_index(index)) == []


def test_the_data_of_a_shard_end_with_its_last_sample(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [8])[0])
    (shard,) = build_index([str(path)]).shards
    assert shard.num_bytes == path.stat().st_size
    with tarfile.open(path) as archive:
        assert shard.data_bytes == archive.getmembers()[-1].offset + 2 * 512  # a header and a label


def test_a_shard_with_nothing_whole_has_no_data(tmp_path: Path) -> None:
    paths = [Path(path) for path in write_shards(tmp_path, [2, 2])]
    paths[0].write_bytes(paths[0].read_bytes()[:700])
    index = build_index([str(path) for path in paths], allow_damaged=True)
    index.save(tmp_path / "index.json")
    broken, whole = Index.load(str(tmp_path / "index.json")).shards
    assert (broken.num_samples, broken.data_bytes, broken.num_bytes) == (0, 0, 700)
    assert whole.num_samples == 2 and [sample.key for sample in read_samples(index, [0])] == ["s00002"]


def test_all_damage_is_counted_and_the_first_twenty_places_are_named(tmp_path: Path) -> None:
    members = [(f"s{n:02d}.{kind}", b"nonsense") for n in range(25) for kind in ("jpg", "cls")]
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0"), *members])
    index = build_index([str(path)])
    assert index.num_damaged == 25 and len(index.damage) == 20
    assert index.damage[-1] == f"{path}: sample s19: the content of .jpg is not a JPEG, PNG or WebP image"


def test_shards_without_a_usable_sample_say_the_commonest_reasons(tmp_path: Path) -> None:
    unlabelled = [(f"u{n}.jpg", jpeg(0)) for n in range(5)]
    named = [(f"n{n}.{kind}", data) for n in range(3) for kind, data in (("jpg", jpeg(0)), ("cls", b"cat"))]
    path = write_tar(tmp_path / "x.tar", [*named, *unlabelled, ("z.cls", b"1")])
    with pytest.raises(DataError) as refused:
        build_index([str(path)])
    assert str(refused.value) == (
        f"no usable sample in 1 shards: no label (.cls .json) (5 times, like {path}: sample u0, which has "
        f".jpg); its .cls is not a whole number from 0 to 2,147,483,647 (3 times, like {path}: sample n0, "
        f"which has 'cat'); no image (.jpg .jpeg .png .webp) (1 times, like {path}: sample z, which has "
        ".cls). Say what holds images and labels: python tools/data.py index SHARDS --image-key EXTENSION "
        "--label-key EXTENSION_OR_FIELD, and --classes FILE for labels that are names"
    )


def test_a_sample_with_two_defects_is_counted_once(tmp_path: Path) -> None:
    """Here images and labels take turns: keys occur twice, and no file has its other half."""
    members = [
        (f"{key}.{kind}", jpeg(0)) for n in range(4) for kind in ("jpg", "cls") for key in (f"a{n}", f"b{n}")
    ]
    path = write_tar(tmp_path / "x.tar", [("good.jpg", jpeg(0)), ("good.cls", b"0"), *members])
    index = build_index([str(path)])
    assert (index.num_samples, index.num_damaged) == (17, 16)
    assert {reason: count for reason, (count, _) in index.reasons.items()} == {
        "no label (.cls .json)": 8,
        "no image (.jpg .jpeg .png .webp)": 8,
    }


def test_a_broken_shard_is_a_reason_and_no_sample(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [8])[0])
    path.write_bytes(path.read_bytes()[:5000])
    index = build_index([str(path)], allow_damaged=True)
    assert index.num_damaged == 0 and index.damage == (index.reasons["a broken archive"][1],)


def test_kinds_of_damage_without_end_are_counted_together(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", data) for n in range(300) for kind, data in (("jpg", b"x"), (f"x{n}", b"x"))]
    path = write_tar(tmp_path / "x.tar", [("good.jpg", jpeg(0)), ("good.cls", b"0"), *members])
    index = build_index([str(path)])
    assert len(index.passed_over) == 101 and index.passed_over["others"] == 201
    assert sum(index.passed_over.values()) == 600


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
    assert list(verify_index(kept)) == list(kept.damage)
    broken, other = verify_index(index)
    assert broken == kept.damage[0]
    assert other.startswith(f"{path}: is not the shard that was indexed: ")


def test_verify_names_damage_that_was_indexed_once(tmp_path: Path) -> None:
    members = [(f"s{n}.{kind}", data) for n in range(8) for kind, data in (("jpg", jpeg(n)), ("cls", b"0"))]
    del members[7]  # the label of s3
    path = write_tar(tmp_path / "x.tar", members)
    assert list(verify_index(build_index([str(path)], chunk_samples=4))) == [
        f"{path}: sample s3: no label (.cls .json): .jpg"
    ]


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
    """Tar has no checksum of the data, and libjpeg silently decodes most flipped bits."""
    path = Path(write_shards(tmp_path, [20])[0])
    index = build_index([str(path)], chunk_samples=4)
    whole = path.read_bytes()
    for place in (header_of(path, "s00005") + 512 + 300, header_of(path, "s00006") - 512):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(bytes(data))
        samples = [sample for chunk in range(5) for sample in read_chunk(index, chunk)]
        bad = [number for number, sample in enumerate(samples) if isinstance(sample, BadSample)]
        assert bad == [4, 5, 6, 7]
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
    check_shards(index)  # the size does not show it
    assert all(isinstance(sample, BadSample) for chunk in range(2) for sample in read_chunk(index, chunk))


def test_samples_that_cannot_be_used_are_indexed_counted_and_named(tmp_path: Path) -> None:
    good = [("a.jpg", jpeg(0)), ("a.cls", b"0")]
    bad = [
        [("text.jpg", b"not an image"), ("text.cls", b"1")],
        [("nolabel.jpg", jpeg(1))],
        [("word.jpg", jpeg(1)), ("word.cls", b"cat")],
        [("fraction.jpg", jpeg(1)), ("fraction.json", b'{"label": 1.5}')],
    ]
    path = write_tar(tmp_path / "x.tar", [*good, *(member for sample in bad for member in sample)])
    index = build_index([str(path)])
    assert index.num_samples == 5 and index.num_damaged == 4
    parts = ("not a JPEG", "no label", "its .cls is not a whole number", "its .json is not a whole number")
    for sentence, part in zip(index.damage, parts, strict=True):
        assert part in sentence
    assert [sample.key for sample in read_samples(index, [0])] == ["a"]
    with pytest.raises(DataError, match="sample text"):
        list(read_samples(index, [1]))


def test_a_key_that_occurs_twice_is_named_and_its_samples_are_used(tmp_path: Path) -> None:
    def index_of(last_label: bytes) -> Index:
        members = [("a.jpg", jpeg(0)), ("a.cls", b"0"), ("b.jpg", jpeg(1)), ("b.cls", b"0")]
        write_tar(tmp_path / "x.tar", [*members, ("a.jpg", jpeg(2)), ("a.cls", last_label)])
        return build_index([str(tmp_path / "x.tar")])

    index = index_of(b"1")
    index.save(tmp_path / "index.json")
    for made in (index, Index.load(str(tmp_path / "index.json"))):
        (sentence,) = doubts(made, "index.json")
        assert (
            f"keys that occur again in their shard: 1, the first in {tmp_path}/x.tar: sample a;" in sentence
        )
        assert made.num_damaged == 0 and not damaged_chunks(made.chunks).any()
        assert made.neighbours.pairs == 2 and index.neighbours.chance == 1 / 3  # of 3 samples
    assert [sample.labels for sample in read_samples(index, range(3))] == [(0,), (0,), (1,)]
    assert "none of which was damaged" in DataRecord.of([index]).change([index_of(b"2")], [])


def test_empty_and_missing_shards_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    assert build_index([str(tmp_path / "whole.tar")]).num_samples == 1
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(DataError, match="ends without its end mark"):
        build_index([str(tmp_path / "zero.tar")])
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar is empty"):
        build_index([str(tmp_path / "empty.tar")])
    with pytest.raises(DataError, match="does not exist"):
        build_index([str(tmp_path / "none.tar")])
    with pytest.raises(StoreError, match=rf'{tmp_path}/ is a folder; name its shards: "{tmp_path}/\*\.tar"$'):
        build_index([f"{tmp_path}/"])


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


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{odd}/a0.tar", ["a0.tar"]),
        ("{odd}/a[0].tar", ["a[0].tar"]),  # it exists; else a0.tar
        ("{odd}/a{{0..1}}.tar", ["a0.tar", "a1.tar"]),
        ("{escaped}/a?.tar", ["a0.tar", "a1.tar"]),
        ("{odd}/a?.tar", []),
    ],
)
def test_what_exists_is_no_pattern(tmp_path: Path, pattern: str, names: list[str]) -> None:
    odd = tmp_path / "odd [x]*"
    odd.mkdir()
    for name in ("a0.tar", "a1.tar", "a[0].tar"):
        (odd / name).touch()
    pattern = pattern.format(odd=odd, escaped=tmp_path / "odd [[]x][*]")
    if names:
        assert storage.expand(pattern) == [f"{odd}/{name}" for name in names]
        return
    with pytest.raises(ConfigError, match=r"no file matches .*; write \[\[\] for each \[ in the name of a"):
        storage.expand(pattern)


def test_pipe_urls_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipe: is not allowed"):
        build_index(["pipe:cat /etc/passwd"])
