"""image_key, label_key, classes: what they read as images and labels, and what they refuse."""

import dataclasses
import gzip
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from make import jpeg, write_tar

from tools.data import main
from vitscale.data.data_config import DataConfig, SourceConfig
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_chunk, read_samples
from vitscale.data.samples import BadSample, SampleKeys
from vitscale.data.sources import open_sources
from vitscale.errors import ConfigError

COUNT = 12
LABELS = [number % 3 for number in range(COUNT)]
NAMES = ["ant", "sea lion", "cat"]


def write_sample(tmp_path: Path, **files: bytes) -> str:
    members = [(f"a.{extension.replace('_', '.')}", content) for extension, content in files.items()]
    return str(
        write_tar(
            tmp_path / "x.tar", [("first.jpg", jpeg(9)), ("first.cls", b"0"), ("first.id", b"0"), *members]
        )
    )


@pytest.mark.parametrize(
    ("keys", "files", "label"),
    [
        ({"label_key": "id"}, {"id": b"7", "cls": b"1"}, 7),
        ({"label_key": "id;cls"}, {"cls": b"1"}, 1),
        ({"label_key": "Fine"}, {"json": b'{"Fine": 5, "label": 1}'}, 5),
        ({"label_key": "fine;coarse"}, {"json": b'{"coarse": 6}'}, 6),
        ({"label_key": "meta/fine"}, {"json": b'{"meta": {"fine": 5}}'}, 5),
        ({"label_key": "meta/fine"}, {"json": b'{"meta/fine": 4, "meta": {"fine": 5}}'}, 4),
        ({"label_key": "meta.json"}, {"meta_json": b'{"label": 5}'}, 5),
        ({"label_key": "json"}, {"json": b'{"label": "5"}', "cls": b"1"}, 5),
        ({"classes": {"cat": 3}}, {"cls": b"cat\n"}, 3),
        ({"classes": {"sea lion": 3}}, {"cls": b"sea lion"}, 3),
        ({"classes": {"sea lion": 3}, "label_key": "name"}, {"json": b'{"name": "sea lion"}'}, 3),
        ({"image_key": "big.jpg"}, {"big_jpg": jpeg(1), "cls": b"2"}, 2),
    ],
    ids=range(12),
)
def test_keys_name_the_image_and_the_labels(
    tmp_path: Path, keys: dict[str, Any], files: dict[str, bytes], label: int
) -> None:
    path = write_sample(tmp_path, **{"jpg": jpeg(0), **files})
    index = build_index([path], keys=SampleKeys(**keys), chunk_samples=1)
    index.save(tmp_path / "index.json")
    (sample,) = read_samples(Index.load(str(tmp_path / "index.json")), [1])
    assert sample.labels == (label,)
    assert sample.image == (jpeg(1) if "big_jpg" in files else jpeg(0))


@pytest.mark.parametrize(
    ("keys", "files", "reason"),
    [
        ({}, {"jpg": jpeg(0), "txt": b"x"}, "no label (.cls .json): .jpg .txt"),
        ({}, {"tif": b"x", "cls": b"1"}, "no image (.jpg .jpeg .png .webp): .tif .cls"),
        (
            {},
            {"jpg": jpeg(0), "cls": b"cat"},
            "its .cls is not a whole number from 0 to 2,147,483,647: 'cat'",
        ),
        (
            {},
            {"jpg": jpeg(0), "json": b'{"caption": 1, "url": 2}'},
            "its .json has no field labels or label or cls: the fields caption url",
        ),
        ({"label_key": "id"}, {"jpg": jpeg(0), "cls": b"1"}, "no label (.id): .jpg .cls"),
        ({"label_key": "id"}, {"jpg": jpeg(0), "json": b"7"}, "its .json has no field id: 7"),
        ({"label_key": "id"}, {"jpg": jpeg(0), "json": b"[" * 9**5}, "its .json is not JSON"),
        (
            {"label_key": "id"},
            {"jpg": jpeg(0), "json": b'{"id": null}'},
            "its .json has no field id: the fields id",
        ),
        (
            {"label_key": "id"},
            {"jpg": jpeg(0), "json": b'{"id": [[1]]}'},
            "its .json, field id, is not a whole number from 0 to 2,147,483,647: a list",
        ),
        (
            {"classes": {"cat": 1}},
            {"jpg": jpeg(0), "cls": b"dog"},
            "its .cls is not the name of a class: 'dog'",
        ),
    ],
    ids=range(10),
)
def test_what_the_keys_do_not_find_is_damage_with_its_reason(
    tmp_path: Path, keys: dict[str, Any], files: dict[str, bytes], reason: str
) -> None:
    index = build_index([write_sample(tmp_path, **files)], keys=SampleKeys(**keys))
    assert index.num_damaged >= 1 and index.damage[-1] == f"{tmp_path}/x.tar: sample a: {reason}"


def test_one_extension_twice_under_a_key_is_damage(tmp_path: Path) -> None:
    members = [("b.jpg", jpeg(0)), ("b.cls", b"1"), ("a.jpg", jpeg(0)), ("a.JPG", jpeg(1)), ("a.cls", b"1")]
    index = build_index([str(write_tar(tmp_path / "x.tar", members))])
    assert list(index.reasons) == ["more than one .jpg under one key"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.json", '{"cat": 1, "ant": 0}'),
        ("names.json", '["ant", "cat"]'),
        ("names.txt", "ant\ncat\n"),
    ],
)
def test_class_names_come_from_a_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    members = [(f"{n}.{kind}", data) for n in range(4) for kind, data in named(n)]
    path = write_tar(tmp_path / "x.tar", members)
    options = ["--label-key", "species", "--classes", str(tmp_path / name), "--workers", "0"]
    assert main(["index", str(path), *options]) == 0
    index = Index.load(str(tmp_path / "index.json"))
    assert index.label_counts == {0: 2, 1: 2} and index.keys.classes == {"ant": 0, "cat": 1}
    assert main(["pack", str(path), str(tmp_path / "out"), "--format", "shards", *options]) == 0
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    assert Index.load(str(tmp_path / "out" / "index.json")).label_counts == {0: 2, 1: 2}


def named(number: int) -> list[tuple[str, bytes]]:
    species = json.dumps({"species": ["ant", "cat"][number % 2]}).encode()
    return [("jpg", jpeg(number)), ("json", species)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nonsense", "are not JSON"),
        ("5", "are no list and no object"),
        ('{"cat": -1}', "give 'cat' the label -1"),
        ("[1]", "give 1 the label 0"),
        ('["cat", "cat"]', "name a class twice"),
        ("[]", "are empty"),
        (None, "do not exist"),
    ],
)
def test_class_names_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "names.json").write_text(content)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    assert main(["index", str(path), "--classes", str(tmp_path / "names.json"), "--workers", "0"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--image-key", "jpg;"], ["--label-key", ""]])
def test_empty_keys_are_refused(tmp_path: Path, capsys, options: list[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    assert main(["index", str(path), *options]) == 2
    assert "has an empty name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fixed"), [("x.tar.gz", "x.tar"), ("x.tgz", "x.tar"), ("x.tar", "x.plain.tar")]
)
@pytest.mark.parametrize("command", ["index", "pack"])
def test_a_compressed_shard_is_named_with_the_command_that_fixes_it(
    tmp_path: Path, capsys, name: str, fixed: str, command: str
) -> None:
    plain = write_tar(tmp_path / "plain", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    shard = tmp_path / name
    shard.write_bytes(gzip.compress(plain.read_bytes()))
    pack = ["pack", str(shard), str(tmp_path / "out"), "--format", "shards"]
    assert main({"index": ["index", str(shard), "--allow-damaged"], "pack": pack}[command]) == 2
    sentence = capsys.readouterr().err.strip()
    assert f"{name} is compressed with gzip" in sentence
    command_line = sentence.partition("decompress it: ")[2]
    *command, redirected, output = shlex.split(command_line)
    assert redirected == ">"
    with open(output, "wb") as file:
        subprocess.run(command, stdout=file, check=True)
    assert (tmp_path / fixed).read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"image_key": "jpg", "label_key": "class_id"}, ""),
        ({}, ""),
        ({"label_key": "cls"}, r"data.label_key 'cls' .* 'class_id'.*--label-key cls"),
        ({"image_key": "png"}, r"data.image_key 'png' .* 'jpg'.*--image-key png"),
    ],
)
def test_a_run_refuses_an_index_made_with_other_keys(
    tmp_path: Path, keys: dict[str, str], refused: str
) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.json", b'{"class_id": 3}')])
    made = build_index([str(path)], keys=SampleKeys(image_key="jpg", label_key="class_id"))
    made.save(tmp_path / "index.json")
    single = DataConfig(index=str(tmp_path / "index.json"), **keys)
    several = DataConfig(sources=(SourceConfig(index=single.index, **keys),))
    for config in (single, several):
        if refused:
            with pytest.raises(ConfigError, match=refused):
                open_sources(config)
        else:
            (source,) = open_sources(config)
            assert source.index.keys.label_key == "class_id"


def test_other_keys_are_other_data(tmp_path: Path) -> None:
    """Where nothing is passed over, the default keys are the same data as in version 2."""
    members = [("a.jpg", jpeg(0)), ("a.cls", b"1"), ("a.txt", b"x")]
    plain = build_index([str(write_tar(tmp_path / "x.tar", members))])
    assert plain.fingerprint() == dataclasses.replace(plain, keys=SampleKeys(strict=True)).fingerprint()
    shards = [str(write_tar(tmp_path / "y.tar", [*members, ("a.json", b"2")]))]
    indexes = [build_index(shards), build_index(shards, keys=SampleKeys(label_key="json"))]
    indexes.append(dataclasses.replace(indexes[0], keys=SampleKeys(strict=True)))
    assert len({index.fingerprint() for index in indexes}) == 3


def test_an_index_of_version_2_means_what_it_meant(tmp_path: Path) -> None:
    """There, a further file made a sample unusable: a run on it replaces the same samples."""
    members = [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", jpeg(n)), ("cls", b"1"))]
    members += [("4.jpg", jpeg(4)), ("4.cls", b"1"), ("4.json", b"1"), ("README", b"x")]
    build_index([str(write_tar(tmp_path / "x.tar", members))]).save(tmp_path / "index.json")
    values = json.loads((tmp_path / "index.json").read_text())
    for name in ("keys", "reasons", "passed_over", "checksum"):
        del values[name]
    values["version"], values["num_samples"] = 2, 6
    values["shards"][0]["num_samples"] = 6
    (tmp_path / "index.json").write_text(json.dumps(values))
    samples = read_chunk(Index.load(str(tmp_path / "index.json")), 0)
    reasons = [sample.reason for sample in samples if isinstance(sample, BadSample)]
    assert reasons == [
        "1 images and 2 label files instead of one of each",
        "a file with the extension ., which is not read",
    ]
