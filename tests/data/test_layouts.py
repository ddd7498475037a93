"""Shards as other tools write them, member for member by webdataset's own writer, and how their
images and labels are named.
"""

import dataclasses
import gzip
import io
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from make import jpeg, write_tar
from PIL import Image

from tools.data import main
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_chunk, read_samples
from vitscale.data.samples import BadSample, SampleKeys
from vitscale.data.sources import DataConfig, SourceConfig, open_sources
from vitscale.errors import ConfigError

COUNT = 12
LABELS = [number % 3 for number in range(COUNT)]
NAMES = ["ant", "sea lion", "cat"]


def webp(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed))).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write(folder: Path, pattern: str, sample: Callable[[int], dict[str, Any]], **options: Any) -> str:
    """Shards of 5 samples by webdataset's ShardWriter; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/{pattern}", maxcount=5, verbose=0, **options) as sink:
        for number in range(COUNT):
            sink.write(sample(number))
    return f"{folder}/*.tar"


def webdataset_docs(folder: Path) -> str:
    """As in webdataset's guide: ShardWriter encodes the label and the JSON."""
    return write(
        folder,
        "train-%06d.tar",
        lambda n: {
            "__key__": f"n01440764/n01440764_{n}",
            "jpg": jpeg(n),
            "cls": LABELS[n],
            "json": {"cname": NAMES[LABELS[n]], "annotations": [{"bbox": [1, 2, 3, 4]}], "label": 99},
        },
    )


def timm_layout(folder: Path) -> str:
    """As in the data sets timm/imagenet-*-wds: a JSON file beside each image and label."""
    (folder / "train").mkdir(parents=True)
    (folder / "_info.json").write_text('{"splits": {}}')
    return write(
        folder / "train",
        "imagenet12k-train-%04d.tar",
        lambda n: {
            "__key__": f"{n:08d}",
            "jpg": jpeg(n),
            "cls": LABELS[n],
            "json": {"filename": f"n01440764_{n}.JPEG", "label": LABELS[n], "width": 16, "height": 16},
        },
    )


def img2dataset_layout(folder: Path) -> str:
    """As img2dataset's writer makes them; the labels are an additional column in the JSON."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as file, webdataset.TarWriter(file) as sink:
            for n in range(shard * 6, shard * 6 + 6):
                meta = {
                    "caption": "a photo of 7 ants",
                    "class_id": LABELS[n],
                    "url": f"https://example.com/{n}.jpg",
                    "key": f"{shard:05d}{n:04d}",
                    "status": "success",
                    "error_message": None,
                    "width": 16,
                    "height": 16,
                    "original_width": 640,
                    "original_height": 480,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                sample = {"__key__": f"{shard:05d}{n:04d}", "jpg": jpeg(n), "txt": meta["caption"]}
                sink.write({**sample, "json": json.dumps(meta, indent=4)})
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return f"{folder}/*.tar"


def clip_benchmark(folder: Path) -> str:
    """As clip_benchmark's webdataset_builder makes them: lossless WebP and a label."""
    pattern = write(
        folder / "test", "%d.tar", lambda n: {"__key__": f"s{n:07d}", "webp": webp(n), "cls": LABELS[n]}
    )
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "test" / "nshards.txt").write_text("3\n")
    return pattern


def many_members(folder: Path) -> str:
    """An image with a mask, an embedding and a URL beside it."""
    return write(
        folder,
        "%05d.tar",
        lambda n: {
            "__key__": f"a.b/{n}",
            "jpg": jpeg(n),
            "seg.png": b"never opened",
            "npy": b"never opened",
            "url": b"https://example.com",
            "pickle": b"never opened",
            "cls": str(LABELS[n]).encode(),
        },
        encoder=False,
    )


LAYOUTS = [
    (webdataset_docs, [], {".json": COUNT}),
    (timm_layout, [], {".json": COUNT}),
    (timm_layout, ["--label-key", "label"], {".cls": COUNT}),
    (img2dataset_layout, ["--label-key", "class_id"], {".txt": COUNT}),
    (clip_benchmark, [], {}),
    (many_members, [], {".npy": COUNT, ".pickle": COUNT, ".seg.png": COUNT, ".url": COUNT}),
]


def samples_of(index: Index) -> list[tuple[bytes, int]]:
    """(image, label) of every sample; the images are unique."""
    samples = read_samples(index, range(index.num_samples))
    return sorted((bytes(sample.image), *sample.labels) for sample in samples)


def expected_of(layout: Callable[[Path], str]) -> list[tuple[bytes, int]]:
    image = webp if layout is clip_benchmark else jpeg
    return sorted((image(n), LABELS[n]) for n in range(COUNT))


@pytest.mark.parametrize(("layout", "options", "passed_over"), LAYOUTS)
def test_a_published_layout_is_indexed_and_packed(
    tmp_path: Path, capsys, layout: Callable[[Path], str], options: list[str], passed_over: dict[str, int]
) -> None:
    pattern, out = layout(tmp_path / "in"), tmp_path / "index.json"
    assert main(["index", pattern, "--out", str(out), "--workers", "0", *options]) == 0
    shown = capsys.readouterr()
    assert f"{COUNT} samples in" in shown.out and ", 0 of them damaged" in shown.out
    counts = ", ".join(f"{count} {extension}" for extension, count in passed_over.items())
    assert f"passed over, neither images nor labels: {counts}" in shown.err or not passed_over
    index = Index.load(str(out))
    assert index.passed_over == passed_over and index.label_counts == {0: 4, 1: 4, 2: 4}
    assert samples_of(index) == expected_of(layout)
    packed = ["pack", pattern, str(tmp_path / "packed"), "--format", "shards", "--workers", "0", *options]
    assert main(packed) == 0
    assert samples_of(Index.load(str(tmp_path / "packed" / "index.json"))) == expected_of(layout)


def test_a_file_that_is_passed_over_is_never_opened(tmp_path: Path) -> None:
    hostile = [("x.pkl", b"cos\nsystem\n"), ("x.json", b"[" * 10_000), ("x.png", b"no image")]
    path = write_tar(tmp_path / "x.tar", [("x.jpg", jpeg(0)), ("x.cls", b"1"), *hostile])
    index = build_index([str(path)])
    assert index.num_damaged == 0 and index.passed_over == {".pkl": 1, ".json": 1, ".png": 1}
    assert samples_of(index) == [(jpeg(0), 1)]


def test_files_without_a_key_belong_to_no_sample(tmp_path: Path) -> None:
    others = [("README", b"x"), ("__info__/x.json", b"{}"), ("._b.jpg", b"macOS"), ("a/.DS_Store", b"x")]
    members = [("a.jpg", jpeg(0)), ("a.cls", b"0"), *others, ("b.jpg", jpeg(1)), ("b.cls", b"1")]
    index = build_index([str(write_tar(tmp_path / "x.tar", [*others, *members]))], chunk_samples=1)
    assert index.num_samples == 2 and index.num_damaged == 0
    assert index.passed_over == {"without a key": 8}
    assert samples_of(index) == sorted([(jpeg(0), 0), (jpeg(1), 1)])


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
            {"jpg": jpeg(0), "json": b'{"id": []}'},
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
    for name in ("keys", "reasons", "passed_over"):
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
