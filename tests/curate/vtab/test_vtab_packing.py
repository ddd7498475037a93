"""Every task of VTAB-1k from a miniature of its raw files to shards, and what these hold."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from curate.vtab.vtab_files import encoded, picture, tar_bytes, write_files
from curate.vtab.vtab_raw import MAKERS, Raw, make_raw
from PIL import Image

from tools.data import main
from vitscale.curate.pack.config import PackConfig, PackReport
from vitscale.curate.pack.run import FORMATS, pack
from vitscale.curate.pack.vtab import retinopathy, sun397
from vitscale.curate.verify import verify_index
from vitscale.data.decode import decode
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample
from vitscale.vtab.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
COUNTS = {"retinopathy": 3}  # its images are enlarged, which takes time
# (TFDS split, number) of train800, val200 and test, of about 30 images in every TFDS split
FROM_THREE = (("train", 30), ("validation", 30), ("test", 30))
FROM_TWO = (("train", 24), ("train", 6), ("test", 30))
EXPECTED = {
    "caltech101": (("train", 96), ("train", 24), ("test", 28)),
    "cifar100": FROM_TWO,
    "dtd": FROM_THREE,
    "flowers102": FROM_THREE,
    "pets": (("train", 24), ("train", 7), ("test", 30)),
    "sun397": FROM_THREE,
    "svhn": FROM_TWO,
    "patch_camelyon": FROM_THREE,
    "eurosat": (("train", 3), ("train", 1), ("train", 26)),
    "resisc45": (("train", 3), ("train", 1), ("train", 26)),
    "retinopathy": (("train", 3), ("validation", 3), ("test", 3)),
    "clevr_count": (("train", 24), ("train", 6), ("validation", 30)),
    "clevr_distance": (("train", 24), ("train", 6), ("validation", 30)),
    "dmlab": FROM_THREE,
    "dsprites_location": (("train", 1), ("train", 1), ("train", 28)),
    "dsprites_orientation": (("train", 1), ("train", 1), ("train", 28)),
    "kitti_distance": (("train", 70), ("validation", 10), ("test", 10)),
    "smallnorb_azimuth": (("train", 30), ("test", 1), ("test", 29)),
    "smallnorb_elevation": (("train", 30), ("test", 1), ("test", 29)),
}


def packed(raw: Raw, out: Path, name: str, **options) -> PackReport:
    config = PackConfig(format=f"vtab/{name}", membership=raw.membership, shuffle=False, **options)
    return pack(str(raw.source), out, config)


def samples_of(report: PackReport, split: str) -> list[RawSample]:
    index = build_index(report.shards[split])
    return list(read_samples(index, range(index.num_samples)))


def stem(key: str) -> str:
    """What a sample's key has of a key of TFDS."""
    name = key.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def test_every_task_has_a_format_and_a_miniature() -> None:
    names = list(TASKS)
    assert [f"vtab/{name}" for name in names] == [name for name in FORMATS if name.startswith("vtab/")]
    assert list(MAKERS) == names == list(EXPECTED)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_packed_with_its_keys_labels_and_pixels(tmp_path: Path, name: str) -> None:
    raw = make_raw(name, tmp_path / "raw", COUNTS.get(name, 30))
    report = packed(raw, tmp_path / "out", name)
    samples = {split: samples_of(report, split) for split in report.shards}
    assert list(samples) == ["train800", "val200", "train800val200", "test"]
    for split, (tfds, count) in zip(("train800", "val200", "test"), EXPECTED[name], strict=True):
        assert len(samples[split]) == count
        by_stem = {stem(key): pair for key, pair in raw.examples[tfds].items()}
        assert len(by_stem) == len(raw.examples[tfds]) or name == "caltech101"
        for number, sample in enumerate(samples[split]):
            prefix, digits, its_stem = sample.key.split("_", 2)
            assert (prefix, int(digits)) == (split, number)
            if name != "caltech101":  # whose stems repeat across classes
                label, image = by_stem[its_stem]
                assert sample.labels == (label,)
                assert image is None or same_picture(bytes(sample.image), image)
    both = [(s.labels, bytes(s.image)) for split in ("train800", "val200") for s in samples[split]]
    assert [(s.labels, bytes(s.image)) for s in samples["train800val200"]] == both
    assert f"vtab/{name}: not the published split" in report.edition and report.num_omissions == 0
    assert json.loads((tmp_path / "out" / "pack-report.json").read_text())["edition"] == report.edition


def same_picture(found: bytes, expected: bytes | np.ndarray) -> bool:
    """The very bytes of a file, or an RGB image of the very pixels."""
    if isinstance(expected, bytes):
        return found == expected
    with Image.open(io.BytesIO(found)) as image:
        return (image.format, image.mode) == ("PNG", "RGB") and np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", ["dtd", "svhn", "dmlab", "eurosat", "clevr_count", "retinopathy"])
def test_the_splits_are_disjoint_and_in_stored_order(tmp_path: Path, name: str) -> None:
    raw = make_raw(name, tmp_path / "raw", COUNTS.get(name, 30))
    report = packed(raw, tmp_path / "out", name)
    by_tfds: dict[str, list[str]] = {}
    for split, (tfds, _) in zip(("train800", "val200", "test"), EXPECTED[name], strict=True):
        by_tfds.setdefault(tfds, []).extend(s.key.split("_", 2)[2] for s in samples_of(report, split))
    for tfds, found in by_tfds.items():
        ordered = sorted(raw.examples[tfds], key=lambda key: hashlib.md5((tfds + key).encode()).digest())
        assert found == [stem(key) for key in ordered]


def test_the_shards_work_with_index_verify_stats_and_repacking(tmp_path: Path, capsys) -> None:
    raw = make_raw("eurosat", tmp_path / "raw", 60)
    out = tmp_path / "out"
    command = ["pack", str(raw.source), str(out), "--format", "vtab/eurosat", "--workers", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "vtab/eurosat: not the published split: train has 60 images instead of 27,000" in printed
    assert sorted(path.name for path in out.glob("*.tar")) == [
        f"{split}-000000.tar" for split in ("test", "train800", "train800val200", "val200")
    ]
    for split in ("train800", "val200", "train800val200", "test"):
        assert not list(verify_index(Index.load(str(out / f"{split}.index.json")), decode_images=True))
    assert main(["index", f"{out}/train800val200-*.tar", "--workers", "0"]) == 0
    assert main(["verify", str(out / "index.json"), "--workers", "0"]) == 0
    assert main(["stats", str(out / "index.json")]) == 0
    again = pack(f"{out}/*.tar", tmp_path / "again", PackConfig(format="shards", short_side=32))
    assert again.num_samples == {"test": 51, "train800": 7, "val200": 2, "train800val200": 9}
    assert all(s.key.count("train800_") == 1 for s in samples_of(again, "train800"))


@pytest.mark.parametrize("form", ["zip", "folder", "tar", "tar.gz", "folder of the zip", "outer folder"])
def test_a_data_set_may_be_packed_or_unpacked(tmp_path: Path, form: str) -> None:
    raw = make_raw("eurosat", tmp_path / "raw")
    expected = packed(raw, tmp_path / "expected", "eurosat")
    with zipfile.ZipFile(raw.source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if form == "tar" or form == "tar.gz":
        source = tmp_path / f"EuroSAT.{form}"
        source.write_bytes(tar_bytes(files, "w" if form == "tar" else "w:gz"))
    elif form == "zip":
        source = raw.source
    elif form == "folder of the zip":
        source = raw.source.parent
    else:
        source = write_files(tmp_path / "unpacked", files) / ("2750" if form == "folder" else "")
    report = packed(Raw(source, raw.examples), tmp_path / "out", "eurosat")
    assert report.num_samples == expected.num_samples
    for split in expected.shards:
        assert samples_of(report, split) == samples_of(expected, split)


def test_caltech_takes_the_training_images_from_a_list(tmp_path: Path) -> None:
    raw = make_raw("caltech101", tmp_path / "raw")
    own = packed(raw, tmp_path / "own", "caltech101")
    assert "TFDS draws its training split at random; here it is the 30 images of each class" in own.edition
    keys = sorted(raw.examples["train"])
    chosen = keys[::2]
    (tmp_path / "train.txt").write_text("".join(f"{key}\n" for key in chosen))
    listed = Raw(raw.source, raw.examples, str(tmp_path / "train.txt"))
    report = packed(listed, tmp_path / "out", "caltech101")
    assert "at random" not in report.edition
    by_image = {image: (key, label) for key, (label, image) in raw.examples["train"].items()}
    for split, expected in (("train800val200", chosen), ("test", keys[1::2])):
        found = [by_image[bytes(sample.image)] for sample in samples_of(report, split)]
        assert sorted(key for key, _ in found) == expected
        assert [s.labels for s in samples_of(report, split)] == [(label,) for _, label in found]
    names = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert names == ["ant", "background_google", "faces", "faces_easy"]


def test_the_lists_of_sun397_may_be_in_a_wheel(tmp_path: Path) -> None:
    raw = make_raw("sun397", tmp_path / "raw", 6)
    wheel = tmp_path / "tensorflow_datasets-4.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in Path(raw.membership).iterdir():
            archive.write(path, f"tensorflow_datasets/image_classification/{path.name}")
    report = packed(Raw(raw.source, raw.examples, str(wheel)), tmp_path / "out", "sun397")
    assert report.num_samples == {"train800": 6, "val200": 6, "train800val200": 12, "test": 6}
    sizes = {Image.open(io.BytesIO(sample.image)).size for sample in samples_of(report, "test")}
    assert sizes == {(24, 24), (387, 310)}


def test_sun397_is_encoded_again_at_most_at_120_000_pixels() -> None:
    large = encoded(picture(3, 0, 400, 500), "PNG")
    small = encoded(picture(3, 0, 300, 400), "BMP")
    for image, size in ((large, (387, 310)), (small, (400, 300))):
        again = Image.open(io.BytesIO(sun397.reencode(image)))
        assert (again.format, again.mode, again.size) == ("JPEG", "RGB", size)
        assert np.abs(np.asarray(again).mean((0, 1)) - picture(3, 0).mean((0, 1))).max() < 3


def test_retinopathy_is_scaled_to_one_radius_masked_and_cropped() -> None:
    y, x = np.mgrid[:400, :500]
    eye = np.where(((y - 200) ** 2 + (x - 250) ** 2 < 180**2)[..., None], np.uint8(90), np.uint8(0))
    prepared = decode(retinopathy.prepare(encoded(np.repeat(eye, 3, axis=-1), "PNG")))
    assert prepared.shape == (540, 540, 3)
    assert np.abs(prepared[0].astype(int) - 128).max() <= 3  # outside of the disc of radius 270
    assert np.abs(prepared[200:340, 200:340].astype(int) - 128).max() <= 3  # no local contrast
    black = decode(retinopathy.prepare(encoded(np.zeros((40, 50, 3), np.uint8), "PNG")))
    assert black.shape == (540, 540, 3)  # its radius counts as 20, so that it becomes 600 x 750


def test_a_pet_that_is_no_jpeg_is_encoded_again(tmp_path: Path) -> None:
    report = packed(make_raw("pets", tmp_path / "raw"), tmp_path / "out", "pets")
    found = [s for s in samples_of(report, "train800val200") if s.key.endswith("chihuahua_121")]
    assert len(found) == 1 and found[0].labels == (2,)
    image = Image.open(io.BytesIO(found[0].image))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert np.abs(np.asarray(image).mean((0, 1)) - picture(2, 7).mean((0, 1))).max() < 3


def test_a_source_of_the_published_size_is_called_the_published_split(tmp_path: Path) -> None:
    raw = make_raw("cifar100", tmp_path / "raw", 100)
    with tarfile.open(raw.source) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    for name, times in (("train", 500), ("test", 100)):
        files[f"cifar-100-binary/{name}.bin"] *= times
    write_files(tmp_path / "full", files)
    listing = FORMATS["vtab/cifar100"](str(tmp_path / "full"), PackConfig(format="vtab/cifar100"))
    assert listing.edition == (
        "vtab/cifar100: the published split (train800 800, val200 200, train800val200 1,000, test 10,000)"
    )
    names = [reference.name for reference in listing.splits["train800"].take(np.arange(5))]
    assert names == ["16399", "1680", "47917", "17307", "27051"]


def test_a_packing_that_is_killed_continues(tmp_path: Path) -> None:
    raw = make_raw("retinopathy", tmp_path / "raw", 3)
    packed(raw, tmp_path / "whole", "retinopathy", samples_per_shard=1)
    out = tmp_path / "out"
    options = ["--format", "vtab/retinopathy", "--samples-per-shard", "1", "--no-shuffle", "--workers", "0"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "data.py", "pack", raw.source, out, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and len(list(out.glob("*.tar"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(out.glob("*.tar")))
    assert 3 <= finished < 15, "it was killed in the midst"
    report = packed(raw, out, "retinopathy", samples_per_shard=1)
    assert report.num_kept_shards == finished
    for path in (tmp_path / "whole").glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_shards_of_clip_benchmark_are_read_as_they_are(tmp_path: Path) -> None:
    """KEY.webp, .jpg or .png with KEY.cls, in train/0.tar and test/0.tar beside text files."""
    for split in ("train", "test"):
        members = {}
        for number, kind in enumerate(("WEBP", "JPEG", "PNG")):
            extension = {"WEBP": "webp", "JPEG": "jpg", "PNG": "png"}[kind]
            members[f"s{number:07d}.{extension}"] = encoded(picture(number, number), kind)
            members[f"s{number:07d}.cls"] = str(number).encode()
        write_files(tmp_path / "wds" / split, {"0.tar": tar_bytes(members, "w"), "nshards.txt": b"1"})
    write_files(tmp_path / "wds", {"classnames.txt": b"a\nb\nc\n"})
    index = build_index([str(tmp_path / "wds" / "train" / "0.tar")])
    assert [s.labels for s in read_samples(index, range(3))] == [(0,), (1,), (2,)]
    report = pack(str(tmp_path / "wds" / "test" / "*.tar"), tmp_path / "out", PackConfig(format="shards"))
    assert report.num_samples == {"train": 3} and report.num_omissions == 0
