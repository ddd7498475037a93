"""Every whole transfer set from a miniature of its raw files to shards, and what these hold."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from curate.transfer.transfer_raw import FOLDER_CLASSES, MAKERS, NAMES, V2_CLASSES, make_raw, write_real
from curate.vtab.vtab_files import write_files
from make import jpeg
from PIL import Image

from tools.data import main
from vitscale.curate.formats import TRANSFER_FORMATS
from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import FORMATS
from vitscale.curate.pack.transfer.imagenet import list_imagenet_real
from vitscale.curate.pack.transfer.objectnet import read_mappings, without_border
from vitscale.curate.pack.vtab.archives import open_files
from vitscale.data.decode import decode
from vitscale.data.index import Index
from vitscale.data.loader import pad_labels
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample
from vitscale.evals.predictions import Predictions

EDITIONS = {
    "pets": "train has 31 images instead of 3,680; test has 30 images instead of 3,669; there are 3 classes "
    "instead of 37 (train 31, test 30)",
    "flowers102": "train has 60 images instead of 2,040; test has 30 images instead of 6,149 "
    "(train 60, test 30)",
    "imagenet_real": "val has 12 images instead of 50,000; 2 images have no label instead of 3,163; "
    "14 labels in all instead of 57,553 (val 12, 2 of them without a label: 10 count)",
    "imagenet_v2": "test has 21 images instead of 10,000; 1,000 classes have another number of images "
    "than 10, like 0 with 3 (test 21)",
    "objectnet": "21 images in all instead of 50,273; 7 folders instead of 313; 5 folders that show classes "
    "of ImageNet instead of 113 (test 15, 5 of 7 folders)",
}


def pack(raw, out: Path, name: str, *options: str) -> dict[str, list[RawSample]]:
    """What the shards of each split hold, read through the indexes that the command writes."""
    labels = ["--val-labels", raw.val_labels] if raw.val_labels else []
    assert (
        main(["pack", str(raw.source), str(out), "--format", name, "--workers", "0", *labels, *options]) == 0
    )
    indexes = {
        split: out / ("index.json" if split == "train" else f"{split}.index.json") for split in raw.samples
    }
    assert {path.name for path in out.glob("*index.json")} == {path.name for path in indexes.values()}
    loaded = {split: Index.load(str(path)) for split, path in indexes.items()}
    return {split: list(read_samples(index, range(index.num_samples))) for split, index in loaded.items()}


def same_picture(found: bytes, expected: bytes | np.ndarray) -> bool:
    """The very bytes of a file, or a PNG of the very pixels."""
    if isinstance(expected, bytes):
        return found == expected
    with Image.open(io.BytesIO(found)) as image:
        return image.format == "PNG" and np.array_equal(np.asarray(image), expected)


def test_every_transfer_set_has_a_format_and_a_miniature() -> None:
    assert list(MAKERS) == list(TRANSFER_FORMATS) == list(EDITIONS)
    assert set(TRANSFER_FORMATS) <= FORMATS.keys()


@pytest.mark.parametrize("name", TRANSFER_FORMATS)
def test_raw_files_become_shards_with_every_image_and_its_labels(tmp_path: Path, name: str, capsys) -> None:
    raw = make_raw(name, tmp_path / "raw")
    found = pack(raw, tmp_path / "out", name)
    for split, expected in raw.samples.items():
        by_stem = {re.sub(r"^[a-z]+_\d{8}_", "", sample.key): sample for sample in found[split]}
        assert by_stem.keys() == expected.keys() and len(found[split]) == len(expected)
        for stem, (labels, image) in expected.items():
            assert by_stem[stem].labels == labels
            assert image is None or same_picture(bytes(by_stem[stem].image), image)
    edition = f"{name}: not the published set: {EDITIONS[name]}"
    assert capsys.readouterr().out.startswith(edition + "\n")
    assert json.loads((tmp_path / "out" / "pack-report.json").read_text())["edition"] == edition
    again = pack(raw, tmp_path / "again", name, "--workers", "2")
    assert again == found  # the same with worker processes


@pytest.mark.parametrize("name", ["pets", "flowers102", "imagenet_real", "imagenet_v2"])
def test_the_unpacked_folder_gives_what_the_archives_give(tmp_path: Path, name: str) -> None:
    raw = make_raw(name, tmp_path / "raw")
    found = pack(raw, tmp_path / "out", name)
    archives = [path for path in (tmp_path / "raw").iterdir() if path.suffix in (".gz", ".tgz", ".tar")]
    for archive in archives:
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path / "raw", filter="data")
        archive.unlink()
    unpacked = type(raw)(tmp_path / "raw", raw.samples, raw.val_labels)
    assert pack(unpacked, tmp_path / "again", name) == found


def test_validation_images_may_be_in_folders_of_their_synsets(tmp_path: Path) -> None:
    raw = make_raw("imagenet_real", tmp_path / "raw")
    found = pack(raw, tmp_path / "out", "imagenet_real")
    files = {
        f"val/n0144{number % 3:04d}/{stem}.JPEG": image
        for number, (stem, (_, image)) in enumerate(raw.samples["val"].items())
        if isinstance(image, bytes)
    }
    sorted_ones = type(raw)(write_files(tmp_path / "sorted", files), raw.samples, raw.val_labels)
    assert pack(sorted_ones, tmp_path / "again", "imagenet_real") == found


def test_class_folders_are_numbers_and_not_text(tmp_path: Path) -> None:
    raw = make_raw("imagenet_v2", tmp_path / "raw")
    found = pack(raw, tmp_path / "out", "imagenet_v2", "--no-shuffle")["test"]
    assert [sample.labels[0] for sample in found] == [label for label in V2_CLASSES for _ in range(3)]
    report = json.loads((tmp_path / "out" / "pack-report.json").read_text())
    assert report["num_left_out"] == 1 and "/9/.DS_Store" in report["left_out"][0]


def test_folders_that_show_no_imagenet_class_are_counted(tmp_path: Path, capsys) -> None:
    raw = make_raw("objectnet", tmp_path / "raw")
    pack(raw, tmp_path / "out", "objectnet")
    said = "2 folders that show no class of ImageNet, like air_freshener: 6 images"
    assert said in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "pack-report.json").read_text())
    assert (report["num_left_out"], report["left_out"]) == (6, [said])
    names = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert (len(names), names[409], names[134], names[517]) == (
        1000,
        "analog clock",
        "crane (134)",
        "crane (517)",
    )
    assert Index.load(str(tmp_path / "out" / "test.index.json")).named(278) == f"278 ({NAMES[278]})"


def test_the_mappings_give_the_real_classes(tmp_path: Path) -> None:
    raw = make_raw("objectnet", tmp_path / "raw")
    names, labels = read_mappings(open_files(str(raw.source), ""))
    assert labels == FOLDER_CLASSES
    assert {index: names[index].partition(" (")[0] for index in NAMES} == NAMES


def test_a_red_border_is_cut_without_a_loss() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (40, 30, 3), dtype=np.uint8)
    framed = pixels.copy()
    framed[[0, -1]] = framed[:, [0, -1]] = (255, 0, 0)
    buffer = io.BytesIO()
    Image.fromarray(framed).save(buffer, "PNG")
    assert np.array_equal(decode(without_border(buffer.getvalue())), pixels[2:-2, 2:-2])


def test_shards_with_unlabelled_samples_can_be_packed_again(tmp_path: Path) -> None:
    raw = make_raw("imagenet_real", tmp_path / "raw")
    found = pack(raw, tmp_path / "out", "imagenet_real")["val"]
    index = tmp_path / "out" / "val.index.json"
    assert main(["pack", str(index), str(tmp_path / "again"), "--format", "shards", "--seed", "5"]) == 0
    again = Index.load(str(tmp_path / "again" / "val.index.json"))
    assert (again.num_samples, again.num_damaged, again.max_labels) == (12, 0, 3)
    copies = list(read_samples(again, range(12)))
    pairs = lambda samples: sorted((bytes(s.image), s.labels) for s in samples)  # noqa: E731
    assert pairs(copies) == pairs(found) and sum(not sample.labels for sample in copies) == 2
    assert main(["verify", str(tmp_path / "again" / "val.index.json"), "--decode", "--workers", "0"]) == 0
    assert main(["stats", str(index)]) == 0


def published_real() -> list[list[int]]:
    """50,000 lists with the published numbers: 3,163 are empty, and 57,553 labels in all."""
    lists: list[list[int]] = [[number % 1000] for number in range(50_000)]
    for number in range(0, 3163):
        lists[13 * number] = []
    extra, number = 57_553 - 46_837, 1
    while extra:
        if number % 13 or number >= 13 * 3163:
            added = min(extra, 8)  # with the first, 9: the most that an image has
            lists[number] += [(number + 7 * (n + 1)) % 1000 for n in range(added)]
            extra -= added
        number += 1
    return lists


def test_the_published_labels_leave_46_837_images_to_score(tmp_path: Path) -> None:
    labels = published_real()
    raw = write_real(tmp_path, labels, [b"\xff\xd8\xff%d" % number for number in range(50_000)])
    listing = list_imagenet_real(
        str(raw.source), PackConfig(format="imagenet_real", val_labels=raw.val_labels)
    )
    assert listing.edition == (
        "imagenet_real: the published set (val 50,000, 3,163 of them without a label: 46,837 count)"
    )
    references = listing.splits["val"].take(np.arange(50_000))
    assert [list(reference.labels) for reference in references] == labels
    assert references[41_233].name == "ILSVRC2012_val_00041234.JPEG"
    padded = pad_labels([reference.labels for reference in references], 9)
    always_zero = torch.zeros(50_000, 1, dtype=torch.int64)
    counts = Predictions(always_zero, torch.ones(50_000, 1), padded, torch.zeros(50_000)).counts()
    assert (counts.num_samples, counts.top1) == (46_837, sum(0 in row for row in labels))
    assert counts.top1 > 0


def test_jpegs_that_cannot_be_read_end_the_packing_by_name(tmp_path: Path, capsys) -> None:
    raw = write_real(tmp_path, [[1], [2], [3]], [jpeg(1), b"text", jpeg(3)])
    command = ["pack", str(raw.source), str(tmp_path / "out"), "--format", "imagenet_real"]
    assert main([*command, "--val-labels", raw.val_labels, "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"ILSVRC2012_val_00000002.JPEG in .*: is not a JPEG, PNG or WebP image; restore it", error
    )
