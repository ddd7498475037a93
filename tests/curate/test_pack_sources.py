"""The sources of a packing: every format as users have it; what is refused or reported."""

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from make import jpeg, write_index, write_tar
from pack_files import packed, samples_of, write_photos
from PIL import Image

from tools.data import main
from vitscale.curate.formats import FORMAT_NAMES
from vitscale.curate.pack import run
from vitscale.curate.pack.config import Omission, PackConfig
from vitscale.curate.pack.imagenet import describe_edition, list_imagenet21k
from vitscale.curate.pack.listing import FileReferences
from vitscale.curate.pack.run import pack
from vitscale.curate.pack.tar_members import TarPlace, list_members
from vitscale.errors import ConfigError, DataError

SYNSETS = ["n00004475", "n00005787", "n01440764"]


def images(synset: str, count: int) -> list[tuple[str, bytes]]:
    return [
        (f"{synset}_{number}.JPEG", jpeg(1000 * SYNSETS.index(synset) + number)) for number in range(count)
    ]


def write_synsets(folder: Path, counts: tuple[int, ...] = (3, 0, 5)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_tar(folder / f"{synset}.tar", images(synset, count))
        for synset, count in zip(SYNSETS, counts, strict=True)
    ]


EXPECTED = {
    (data, (label,)) for label, count in ((0, 3), (2, 5)) for _, data in images(SYNSETS[label], count)
}


def test_every_format_has_its_reader() -> None:
    assert tuple(run.FORMATS) == FORMAT_NAMES


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet21k_is_a_folder_of_synset_tars_at_any_depth(tmp_path: Path, workers: int) -> None:
    write_synsets(tmp_path / "in" / "winter21_whole")
    (tmp_path / "in" / "words.txt").write_text("n00004475 organism")
    report = packed(tmp_path / "in", tmp_path / "out", format="imagenet21k", workers=workers)
    samples = samples_of(report)
    assert {(s.image, s.labels) for s in samples} == EXPECTED
    assert samples[4].key == "train_00000004_n01440764_1"
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == SYNSETS
    assert json.loads((tmp_path / "out" / "synsets.json").read_text())["n01440764"] == 2
    assert report.num_omissions == 1 and "words.txt" in report.omissions[0]


@pytest.mark.parametrize(
    ("num_synsets", "words"),
    [
        (21_841, "21,841 synsets: fall11; label i is the i-th WordNet id in rising order"),
        (19_167, "19,167 synsets: winter21; label i"),
        (21_843, "21,843 synsets: those of the released ViT heads"),
        (3, "3 synsets: no known edition (fall11 has 21,841, winter21 has 19,167"),
    ],
)
def test_the_edition_of_imagenet21k_is_named_by_its_classes(num_synsets: int, words: str) -> None:
    sentence = describe_edition([f"n{number:08d}" for number in range(num_synsets)])
    assert sentence.startswith(words)
    assert ("heads have 21,843 classes in that order" in sentence) == (num_synsets != 21_843)
    assert ("n03931044 and n09859684" in sentence) == (num_synsets == 21_841)


def test_a_packing_says_its_edition_and_keeps_its_class_names(tmp_path: Path, capsys) -> None:
    write_synsets(tmp_path / "in")
    command = ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "imagenet21k"]
    assert main([*command, "--workers", "0"]) == 0
    assert "3 synsets: no known edition" in capsys.readouterr().out
    assert "edition" in json.loads((tmp_path / "out" / "pack-report.json").read_text())
    pattern = str(tmp_path / "out" / "*.tar")
    assert main(["pack", pattern, str(tmp_path / "again"), "--format", "shards", "--workers", "0"]) == 0
    for name in ("classes.json", "synsets.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_tar_of_tars_is_packed_in_place(tmp_path: Path) -> None:
    inner = [(f"winter21/{path.name}", path.read_bytes()) for path in write_synsets(tmp_path / "in")]
    outer = write_tar(tmp_path / "winter21_whole.tar", inner)
    report = packed(outer, tmp_path / "out", format="imagenet21k")
    assert {(s.image, s.labels) for s in samples_of(report)} == EXPECTED


@pytest.mark.parametrize("layout", ["tar", "folder of the tar", "folder of synsets"])
def test_imagenet1k_comes_with_its_validation_set(tmp_path: Path, layout: str) -> None:
    inner = [(path.name, path.read_bytes()) for path in write_synsets(tmp_path / "synsets")]
    (tmp_path / "whole").mkdir()
    outer = write_tar(tmp_path / "whole" / "ILSVRC2012_img_train.tar", inner)
    source = {"tar": outer, "folder of the tar": outer.parent, "folder of synsets": tmp_path / "synsets"}
    val = [(f"ILSVRC2012_val_0000000{n}.JPEG", jpeg(n)) for n in (2, 1, 3)]
    if layout == "tar":
        val_images = write_tar(tmp_path / "ILSVRC2012_img_val.tar", val)
    else:
        val_images = tmp_path / "val"
        val_images.mkdir()
        for name, data in val:
            (val_images / name).write_bytes(data)
    labels = tmp_path / "val.txt"
    labels.write_text("n01440764\nn00004475\nn00005787\n")
    options = {"format": "imagenet1k", "val_images": str(val_images), "val_labels": str(labels)}
    report = packed(source[layout], tmp_path / "out", **options)
    assert {(s.image, s.labels) for s in samples_of(report)} == EXPECTED
    assert [(s.image, s.labels) for s in samples_of(report, "val")] == [
        (jpeg(1), (2,)),
        (jpeg(2), (0,)),
        (jpeg(3), (1,)),
    ]
    labels.write_text("n01440764\nn00004475\n")
    with pytest.raises(DataError, match=r"holds 3 images and .* 2 synsets"):
        packed(source[layout], tmp_path / "other", **options)
    labels.write_text("n01440764\n490\nn00005787\n")
    with pytest.raises(DataError, match="line 2 is '490', not a synset of the training set"):
        packed(source[layout], tmp_path / "other", **options)


def test_damaged_archives_are_reported_and_their_whole_part_packed(tmp_path: Path) -> None:
    cut, _, broken = write_synsets(tmp_path / "in", (4, 2, 5))
    cut.write_bytes(cut.read_bytes()[:1500])  # within the second image
    data = bytearray(broken.read_bytes())
    offset = list_members(TarPlace(str(broken), 0, "")).files[2][1] - 512
    data[offset : offset + 4] = b"\xff\xff\xff\xff"
    broken.write_bytes(data)
    (tmp_path / "in" / "n09999999.tar").write_bytes(b"")
    info = tarfile.TarInfo("huge.JPEG")
    info.size = 2**70
    (tmp_path / "in" / "n08888888.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    report = packed(tmp_path / "in", tmp_path / "out", format="imagenet21k")
    for name in ("n00004475", "n01440764", "n08888888", "n09999999"):
        assert sum(name in sentence and "damaged" in sentence for sentence in report.omissions) == 1
    assert [s.labels for s in samples_of(report)].count((2,)) == 2
    assert all(s.image[-2:] == b"\xff\xd9" for s in samples_of(report))


def test_links_in_archives_and_data_after_their_ends_are_reported(tmp_path: Path) -> None:
    linked, _, joined = write_synsets(tmp_path / "in", (2, 1, 2))
    with tarfile.open(linked, "a") as archive:
        for name, kind in (("hard.JPEG", tarfile.LNKTYPE), ("soft.JPEG", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "n00004475_0.JPEG"
            archive.addfile(info)
    joined.write_bytes(joined.read_bytes() * 2)
    inner = [(path.name, path.read_bytes()) for path in sorted(linked.parent.iterdir())]
    outer = write_tar(tmp_path / "whole.tar", inner)
    outer.write_bytes(outer.read_bytes() + b"more")
    for number, source in enumerate((linked.parent, outer)):
        report = packed(source, tmp_path / str(number), format="imagenet21k")
        assert report.num_samples == {"train": 5}
        *of_outer, hard, soft, end = report.omissions
        assert [sentence.partition(": ")[0] for sentence in of_outer] == [str(outer)] * number
        assert hard.startswith("hard.JPEG in") and "a link to n00004475_0.JPEG" in hard
        assert soft.startswith("soft.JPEG in") and "n01440764" in end and "data after the end" in end
    for path in (linked, joined):  # as shards, they have images without labels
        with pytest.raises(DataError, match=r"link to n00004475_0|data after the end"):
            packed(path, tmp_path / "shards", format="shards")


def test_archives_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    paths = write_synsets(source)
    assert packed(source, out, format="imagenet21k").num_samples == {"train": 8}
    with tarfile.open(tmp_path / "winter21_whole.tar.gz", "w:gz") as archive:
        archive.add(paths[0], paths[0].name)
    (source / "again").mkdir()
    (source / "again" / "n00004475.tar").write_bytes(paths[0].read_bytes())
    (tmp_path / "empty").mkdir()
    for refused, sentence in (
        (tmp_path / "winter21_whole.tar.gz", "must be unpacked first"),
        (tmp_path / "none.tar", "cannot be read"),
        (source, r"holds n00004475.tar twice"),
        (tmp_path / "empty", "holds no nXXXXXXXX.tar"),
    ):
        with pytest.raises(DataError, match=sentence):
            packed(refused, out, format="imagenet21k")


def test_listing_an_archive_reads_headers_only(tmp_path: Path) -> None:
    path, size = tmp_path / "n00004475.tar", 40 << 20
    with open(path, "wb") as file:
        for number in range(50):  # two gigabytes of holes: read in full, they would take seconds
            info = tarfile.TarInfo(f"n00004475_{number}.JPEG")
            info.size = size
            file.write(info.tobuf())
            file.seek(size, os.SEEK_CUR)
        file.write(bytes(1024))
    before = read_bytes_of_this_process()
    references = list_imagenet21k(str(tmp_path), PackConfig(format="imagenet21k")).splits["train"]
    assert len(references) == 50 and read_bytes_of_this_process() - before < 2 << 20
    last = references.take(np.array([49]))[0]
    assert isinstance(last.read(), bytes) and len(last.read()) == size


def read_bytes_of_this_process() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_a_member_too_large_for_an_image_is_left_out(tmp_path: Path) -> None:
    references = FileReferences("")
    archive = references.add_archive(str(write_tar(tmp_path / "x.tar", [("x.jpg", jpeg(0))])))
    for size in (len(jpeg(0)), 1 << 40):
        references.add("x.jpg", (0,), size, archive, 512)
    small, huge = references.take(np.arange(2))
    assert small.read() == jpeg(0)
    with pytest.raises(Omission, match=r"x.jpg in .*x.tar: 1,099,511,627,776 bytes"):
        huge.read()


@pytest.mark.parametrize("num_more", [-1, 1, 100])
def test_a_file_that_was_cut_or_has_grown_since_it_was_listed_is_left_out(
    tmp_path: Path, num_more: int
) -> None:
    references = FileReferences(str(tmp_path))
    references.add("x.jpg", (0,), 400)
    (reference,) = references.take(np.arange(1))
    (tmp_path / "x.jpg").write_bytes(bytes(400))
    assert reference.read() == bytes(400)
    (tmp_path / "x.jpg").write_bytes(bytes(400 + num_more))
    with pytest.raises(Omission, match=r"x.jpg: its size is no longer the 400 bytes that were listed"):
        reference.read()


def test_existing_shards_are_shuffled_cut_and_re_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for split, shard, numbers in (("train", 0, range(5)), ("train", 1, range(5, 12)), ("val", 0, range(3))):
        members = []
        for n in numbers:
            members += [
                (f"a/k{n}.cls", f"{n} 20".encode()),
                (f"a/k{n}.jpg", jpeg(n, 40)),
                (f"a/k{n}.txt", b"-"),
            ]
        write_tar(folder / f"{split}-{shard:06d}.tar", members)
    (folder / "classes.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"classes\.json cannot be read as JSON .*; fix or remove it"):
        pack(f"{folder}/val-*.tar", tmp_path / "damaged", PackConfig(format="shards"))
    (folder / "classes.json").write_text(json.dumps([f"c{n}" for n in range(21)]))
    report = pack(
        f"{folder}/{{train,val}}-*.tar", tmp_path / "new", PackConfig(format="shards", samples_per_shard=4)
    )
    assert report.num_samples == {"train": 12, "val": 3} and len(report.shards["train"]) == 3
    assert {(s.image, s.labels) for s in samples_of(report)} == {(jpeg(n, 40), (n, 20)) for n in range(12)}
    assert "c20" in (tmp_path / "new" / "classes.json").read_text()
    again = packed(tmp_path / "new" / "*.tar", tmp_path / "small", format="shards", short_side=20, workers=2)
    samples = samples_of(again)
    assert all(re.fullmatch(r"train_\d{8}_k\d+", s.key) for s in samples)
    assert all(len(s.image) < len(jpeg(0, 40)) for s in samples)
    assert {s.labels for s in samples} == {(n, 20) for n in range(12)}


def test_what_is_wrong_in_a_shard_is_reported(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg(0)), ("a.cls", b"1"), ("b.jpg", jpeg(1)), ("c.jpg", jpeg(2)), ("c.cls", b"cat")]
    members += [
        ("d.jpg", jpeg(3)),
        ("d.cls", b"99999999999"),
        ("e.jpg", jpeg(4)),
        ("e.json", b'{"label": 3}'),
    ]
    members += [("e.id", b"17"), ("f.jpg", b"text"), ("f.cls", b"1")]
    path = write_tar(tmp_path / "x.tar", members)
    report = packed(path, tmp_path / "out", format="shards")
    assert [s.labels for s in samples_of(report)] == [(1,), (3,)]
    omissions = "\n".join(report.omissions)
    for words in (
        f"no label (.cls .json) (1 times, like {path}: sample b, which has .jpg)",
        f"its .cls is not a whole number from 0 to 2,147,483,647 (2 times, like {path}: sample c, which",
        "f in",
    ):
        assert words in omissions
    assert report.num_omissions == 4


def test_shards_that_are_missing_remote_or_useless_are_refused(tmp_path: Path) -> None:
    for source, sentence in (
        (tmp_path / "none-*.tar", "no file matches"),
        ("s3://b/x.tar", "in a store, cannot be packed"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            packed(source, tmp_path / "out", format="shards")
    unlabelled = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0))])
    with pytest.raises(DataError, match=r"holds no usable sample: no label .*sample a, which has .jpg"):
        packed(unlabelled, tmp_path / "out", format="shards")
    labelled = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"1")])
    assert packed(labelled, tmp_path / "out", format="shards").num_samples == {"train": 1}


def test_names_of_any_length_and_script_become_plain_keys(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for name in ("ü b.jpg", "猫.jpg", "x" * 200 + ".jpg", os.fsdecode(b"\xff.jpg")):
        (folder / name).write_bytes(jpeg(len(name)))
    samples = samples_of(packed(tmp_path / "photos", tmp_path / "out"))
    assert len(samples) == 4 and all(re.fullmatch(r"train_\d{8}_[\w-]{1,60}", s.key) for s in samples)
    assert all(s.key.isascii() for s in samples)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        assert all(member.isfile() and not member.pax_headers for member in archive)


def test_images_of_other_kinds_are_reported(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "ant" / "g.jpg", "GIF")
    report = packed(source, tmp_path / "out")
    assert report.num_omissions == 1
    assert "g.jpg: its content is not a JPEG, PNG or WebP" in report.omissions[0]


def test_an_index_with_shards_in_a_store_is_not_packed_without_them(tmp_path: Path) -> None:
    path = write_index(tmp_path / "shards", [3, 2])
    text = path.read_text()
    path.write_text(text.replace('"train-000001.tar"', '"s3://bucket/train-000001.tar"'))
    config = PackConfig(format="shards")
    with pytest.raises(ConfigError, match=r"s3://bucket/train-000001.tar, .* cannot be packed from there"):
        pack(str(path), tmp_path / "out", config)
    path.write_text(text)
    assert pack(str(path), tmp_path / "out", config).num_samples == {"train": 5}
