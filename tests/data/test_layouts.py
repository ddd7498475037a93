"""Shards as other tools write them, member for member by webdataset's own writer, and how their
images and labels are named.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from make import jpeg, write_tar
from PIL import Image

from tools.data import main
from vitscale.curate.pack.shards import list_shard
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_samples
from vitscale.data.samples import DEFAULT_KEYS

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
    sentence = counts and f"passed over, neither images nor labels: {counts}\n"
    assert shown.err == sentence
    index = Index.load(str(out))
    assert index.passed_over == passed_over and index.label_counts == {0: 4, 1: 4, 2: 4}
    assert samples_of(index) == expected_of(layout)
    packed = ["pack", pattern, str(tmp_path / "packed"), "--format", "shards", "--workers", "0", *options]
    assert main(packed) == 0
    assert capsys.readouterr().err == sentence
    report = json.loads((tmp_path / "packed" / "pack-report.json").read_text())
    assert report.get("passed_over", {}) == passed_over
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
    path = str(write_tar(tmp_path / "x.tar", [*others, *members]))
    index = build_index([path], chunk_samples=1)
    assert index.num_samples == 2 and index.num_damaged == 0
    assert index.passed_over == list_shard(path, DEFAULT_KEYS).passed_over == {"without a key": 8}
    assert samples_of(index) == sorted([(jpeg(0), 0), (jpeg(1), 1)])
