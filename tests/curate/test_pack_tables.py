"""Tables of images as a source: CSV and lines of JSON, their labels, splits and mistakes."""

import json
import tarfile
from pathlib import Path

import pytest
from make import jpeg
from pack_files import read_all

from vitscale.curate.pack.config import PackConfig, PackReport
from vitscale.curate.pack.run import pack
from vitscale.data.samples import RawSample
from vitscale.errors import DataError


def pack_table(table: Path, out: Path) -> PackReport:
    """Pack a .csv or .jsonl file in the order of its rows."""
    return pack(str(table), out, PackConfig(format=table.suffix[1:], shuffle=False))  # type: ignore[arg-type]


def samples_of(report: PackReport, split: str = "train") -> list[RawSample]:
    return read_all(report.shards[split])


def write_images(folder: Path, count: int = 4) -> None:
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))


def test_a_csv_table_has_class_indices_or_names(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a.csv").write_text("path,label\nimages/0.jpg,7\nimages/1.jpg,2\n")
    report = pack_table(tmp_path / "a.csv", tmp_path / "a")
    assert [(s.image, s.labels) for s in samples_of(report)] == [(jpeg(0), (7,)), (jpeg(1), (2,))]
    assert not (tmp_path / "a" / "classes.json").exists()
    absolute = tmp_path / "images" / "1.jpg"
    (tmp_path / "b.csv").write_text(f'label,path\ntiger cat,images/0.jpg\n"ant, red",{absolute}\n')
    report = pack_table(tmp_path / "b.csv", tmp_path / "b")
    assert [(s.image, s.labels) for s in samples_of(report)] == [(jpeg(0), (1,)), (jpeg(1), (0,))]
    assert json.loads((tmp_path / "b" / "classes.json").read_text()) == ["ant, red", "tiger cat"]


def test_tables_have_several_labels_and_splits(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a.csv").write_text("path,labels\nimages/0.jpg,3 17\nimages/1.jpg,5;3;5\nimages/2.jpg,9\n")
    rows = [
        {"path": "images/0.jpg", "labels": [17, 3], "split": "val"},
        {"path": "images/1.jpg", "label": 4},
        {"path": "images/2.jpg", "labels": "3 5"},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    report = pack_table(tmp_path / "a.csv", tmp_path / "a")
    assert [s.labels for s in samples_of(report)] == [(3, 17), (5, 3), (9,)]
    with tarfile.open(report.shards["train"][0]) as archive:
        member = archive.extractfile("train_00000000_0.cls")
        assert member and member.read() == b"3 17"
    report = pack_table(tmp_path / "b.jsonl", tmp_path / "b")
    assert [s.labels for s in samples_of(report)] == [(4,), (3, 5)]
    assert [s.labels for s in samples_of(report, "val")] == [(17, 3)]
    assert list(report.shards) == ["train", "val"]
    (tmp_path / "c.jsonl").write_text('{"path": "images/0.jpg", "labels": ["tiger cat", "7"]}')
    pack_table(tmp_path / "c.jsonl", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "classes.json").read_text()) == ["7", "tiger cat"]


def test_rows_without_image_or_label_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a.csv").write_text("path,label\nimages/0.jpg,1\nimages/gone.jpg,1\n,1\nimages/1.jpg,\n")
    report = pack_table(tmp_path / "a.csv", tmp_path / "a")
    assert report.num_samples == {"train": 1} and report.num_omissions == 3
    assert "line 4 of" in report.omissions[0] and "no path" in report.omissions[0]
    assert "line 5 of" in report.omissions[1] and "no label" in report.omissions[1]
    assert "gone.jpg: cannot be read (No such file" in report.omissions[2]


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ("file,label\nx.jpg,1\n", "path,label\nx.jpg,1\n", "the columns file,label; they must be path,"),
        ("path,class\nx.jpg,1\n", "path,labels\nx.jpg,1\n", "the columns path,class; they must be path,"),
        ("", "path,label\nx.jpg,1\n", "has the columns ; they must be"),
        ("path,label\n", "path,label\nx.jpg,1\n", "holds no row"),
        ("path,label\nx.jpg,-1\n", "path,label\nx.jpg,0\n", "has the label -1"),
        (f"path,label\nx.jpg,{2**31}\n", f"path,label\nx.jpg,{2**31 - 1}\n", "has the label 2147483648"),
        ("path,label\nx.jpg,3 17\n", "path,labels\nx.jpg,3 17\n", "line 2 of .* several labels, '3 17'"),
        ('path,label\nx.jpg,"3,17"\n', 'path,labels\nx.jpg,"3,17"\n', "line 2 of .* several labels, '3,17'"),
        ("path,label,split\nx.jpg,3,dev\n", "path,label,split\nx.jpg,3,train\n", "the split 'dev'"),
        ("path,label\nx, y.jpg,3\n", 'path,label\n"x, y.jpg",3\n', "line 2 of .* more cells than the header"),
        ("path,label\nx\0.jpg,3\n", "path,label\nx.jpg,3\n", "line 2 of .* has the path"),
        ('path,label\n"x.jpg,3\ny.jpg,1\n', "path,label\nx.jpg,3\n", "CSV after line 1 .* close all quotes"),
        ('path,label\n"x.jpg,3\ny.jpg,1"', "path,label\nx.jpg,3\n", "lines 2 to 3 .* are one row"),
        ('path,label\nx.jpg,3\n"x.jpg,3\n"y.jpg,1\n', "path,label\nx.jpg,3\n", "CSV after line 2 "),
        ("path,label\nx.jpg,10.0\n", "path,label\nx.jpg,10\n", "line 2 of .* label 10.0; write whole"),
        ("path,labels\nx.jpg,1 cat 3.\n", "path,labels\nx.jpg,v3.0\n", "line 2 of .* has the label 3.;"),
        ("path,label,label\nx.jpg,1,2\n", "path,label,,\nx.jpg,1,2,3\n", "has 2 columns label; keep the"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_wrong_csv_table_is_refused_and_the_corrected_one_is_not(
    tmp_path: Path, wrong: str, right: str, sentence: str
) -> None:
    check_table(tmp_path / "a.csv", wrong, right, sentence)


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ('{"path": "x.jpg"', '{"path": "x.jpg", "label": 1}', "line 1 of .* is not JSON"),
        ("[" * 100_000, '{"path": "x.jpg", "label": 1}', "line 1 of .* is not JSON"),
        ('["x.jpg", 1]', '{"path": "x.jpg", "label": 1}', "line 1 of .* is not a JSON object"),
        ('{"path": "x.jpg"}', '{"path": "x.jpg", "labels": [1]}', "line 1 of .* has the columns path"),
        ('{"path": "x.jpg", "label": 1.5}', '{"path": "x.jpg", "label": 1}', r"has the labels \[1.5\]"),
        ('{"path": null, "label": 1}', '{"path": "x.jpg", "label": 1}', "has the path None"),
        ('{"path": "\\ud800.jpg", "label": 1}', '{"path": "\\u00fc.jpg", "label": 1}', "has the path"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_wrong_jsonl_table_is_refused_and_the_corrected_one_is_not(
    tmp_path: Path, wrong: str, right: str, sentence: str
) -> None:
    check_table(tmp_path / "a.jsonl", f"{wrong}\n", f"{right}\n", sentence)


def check_table(path: Path, wrong: str, right: str, sentence: str) -> None:
    """The right table is packed, the wrong one refused by its sentence."""
    for name in ("x.jpg", "x, y.jpg", "ü.jpg"):
        (path.parent / name).write_bytes(jpeg(0))
    path.write_text(right)
    assert pack_table(path, path.parent / "right").num_samples == {"train": 1}
    path.write_text(wrong)
    with pytest.raises(DataError, match=sentence):
        pack_table(path, path.parent / "wrong")


@pytest.mark.parametrize(
    ("suffix", "sentence"), [("csv", "cannot be read as CSV"), ("jsonl", "cannot be read as lines of JSON")]
)
def test_a_table_that_is_missing_or_not_text_is_refused(tmp_path: Path, suffix: str, sentence: str) -> None:
    (tmp_path / f"binary.{suffix}").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary"):  # the tests above read tables that are neither
        with pytest.raises(DataError, match=sentence):
            pack_table(tmp_path / f"{name}.{suffix}", tmp_path / "out")
