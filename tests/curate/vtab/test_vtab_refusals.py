"""What is wrong in a source of VTAB-1k is refused in one sentence."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from curate.vtab.vtab_damage import (
    cut,
    drop_scene,
    edit_hdf5,
    edit_text,
    edit_zip,
    flip,
    pack_gzip,
    remove,
    set_scene,
    write,
)
from curate.vtab.vtab_files import example_bytes, tar_bytes, write_mat, write_norb, write_records, write_zip
from curate.vtab.vtab_raw import Raw, make_raw

from tools.data import main
from vitscale.curate.pack.config import PackConfig, PackReport
from vitscale.curate.pack.run import FORMATS, pack
from vitscale.errors import ConfigError, DataError

NORB = "smallnorb-5x46789x9x18x6x2x96x96-training"
DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5"
CAMELYON = "camelyonpatch_level_2_split_train"


def packed(raw: Raw, out: Path, name: str) -> PackReport:
    config = PackConfig(format=f"vtab/{name}", membership=raw.membership)
    return pack(str(raw.source), out, config)


RECORD = {"image": b"\xff\xd8\xff", "filename": b"a.jpg"}
CASES = [
    ("caltech101", write("caltech-101.zip", b""), "is damaged or not an uncompressed tar"),
    (
        "caltech101",
        lambda f: write_zip(f / "caltech-101.zip", {}),
        "holds no image_0001.jpg; vtab/caltech101 reads",
    ),
    ("cifar100", cut("cifar-100-binary.tar.gz"), "cannot be read as a folder or tar archive"),
    ("dtd", cut("dtd-r1.0.1.tar.gz"), "is cut or damaged .*; download it again"),
    (
        "dtd",
        lambda f: (f / "dtd-r1.0.1.tar.gz").write_bytes(tar_bytes({})),
        "holds no labels/train1.txt; vtab/dtd",
    ),
    ("flowers102", cut("setid.mat"), "no whole MATLAB file|no array of integers"),
    ("flowers102", flip("setid.mat", -9), "Error -3 while decompressing"),
    ("flowers102", write("imagelabels.mat", b"x" * 200), "no whole MATLAB file"),
    ("flowers102", write("imagelabels.mat", b"MATLAB 7.3".ljust(124) + b"\0\2IM"), "it is of version 7.3"),
    ("flowers102", remove("setid.mat"), "holds no setid.mat; vtab/flowers102 reads a folder"),
    (
        "flowers102",
        lambda f: write_mat(f / "setid.mat", trnid=np.array([[0, 5]], np.uint16)),
        "names images from 0",
    ),
    (
        "flowers102",
        lambda f: write_mat(f / "imagelabels.mat", labels=np.full((1, 90), 103, np.uint8)),
        "label 102, but",
    ),
    ("flowers102", cut("102flowers.tgz"), r"holds no image_\d+.jpg; .*102flowers.tgz is cut or damaged"),
    ("pets", remove("annotations.tar.gz"), "holds no annotations/trainval.txt; vtab/pets reads"),
    ("pets", cut("images.tar.gz", 0.3), "holds no images/.*is damaged at byte"),
    ("svhn", cut("test_32x32.mat"), "test_32x32.mat is no whole MATLAB file"),
    ("svhn", remove("train_32x32.mat"), "holds no train_32x32.mat; vtab/svhn reads a folder"),
    (
        "svhn",
        lambda f: write_mat(
            f / "train_32x32.mat", X=np.zeros((32, 32, 3, 4), np.uint8), y=np.ones((3, 1), np.uint8)
        ),
        "has 4 images, but 3 labels",
    ),
    (
        "svhn",
        lambda f: write_mat(
            f / "train_32x32.mat", X=np.zeros((32, 32, 3, 4), np.uint8), y=np.zeros((4, 1), np.uint8)
        ),
        "has y from 0 to 0; SVHN writes 1 to 10",
    ),
    (
        "svhn",
        lambda f: write_mat(
            f / "train_32x32.mat", X=np.zeros((4, 32, 32, 3), np.uint8), y=np.ones((4, 1), np.uint8)
        ),
        r"has X of \(4, 32, 32, 3\) uint8, not \(32, 32, 3, n\)",
    ),
    ("patch_camelyon", cut(f"{CAMELYON}_x.h5"), "train_x.h5 is no whole HDF5 file"),
    ("patch_camelyon", write(f"{CAMELYON}_y.h5", b"nothing"), "train_y.h5 is no whole HDF5 file"),
    ("patch_camelyon", pack_gzip(f"{CAMELYON}_x.h5"), "is compressed with gzip; decompress it: gzip -dk"),
    (
        "patch_camelyon",
        edit_hdf5(f"{CAMELYON}_y.h5", "y", np.zeros((29, 1, 1, 1), np.uint8)),
        "30 images and 29 labels",
    ),
    (
        "patch_camelyon",
        edit_hdf5(f"{CAMELYON}_y.h5", "y", np.full((30, 1, 1, 1), 2)),
        "label 2, but .* labels 0 to 1",
    ),
    ("patch_camelyon", edit_hdf5(f"{CAMELYON}_x.h5", "x", None), "has no array x"),
    (
        "dsprites_location",
        edit_hdf5(DSPRITES, "imgs", np.full((30, 64, 64), 255, np.uint8)),
        "a pixel of 255",
    ),
    (
        "dsprites_location",
        edit_hdf5(DSPRITES, "imgs", np.zeros((30, 32, 32), np.uint8)),
        r"imgs of \(30, 32, 32\)",
    ),
    (
        "dsprites_orientation",
        edit_hdf5(DSPRITES, "latents/classes", np.full((30, 6), 40)),
        "the label 16, but",
    ),
    ("eurosat", cut("EuroSAT.zip"), "EuroSAT.zip is no whole zip archive"),
    (
        "eurosat",
        flip("EuroSAT.zip", 300),
        "is damaged: its bytes do not have the checksum .*whole or nothing",
    ),
    ("eurosat", edit_zip("EuroSAT.zip", dict.clear), "holds no CLASS/CLASS_1.jpg; vtab/eurosat reads"),
    (
        "eurosat",
        edit_zip("EuroSAT.zip", lambda f: f.update({"x/Forest/Forest_1.jpg": b""})),
        "keep one of them",
    ),
    ("retinopathy", remove("trainLabels.csv"), "holds no trainLabels.csv; vtab/retinopathy reads"),
    ("retinopathy", edit_text("trainLabels.csv", "0_left,0", "0_left,five"), "line 2 of trainLabels.csv"),
    (
        "retinopathy",
        edit_text("trainLabels.csv", "0_left,0", "0_left,5"),
        "0_left of train has the label 5, but",
    ),
    ("retinopathy", edit_text("trainLabels.csv", "0_left,0", "3_right,0"), "has 3_right 2 times; keep one"),
    (
        "retinopathy",
        edit_text("retinopathy_solution.csv", "Usage", "Use"),
        "columns must be image,level,Usage",
    ),
    ("retinopathy", remove("train/0_left.jpeg"), r"train/0_left.jpeg"),
    ("retinopathy", cut("train/0_left.jpeg", 0.5), "0_left.jpeg: its content cannot be decoded"),
    ("clevr_count", cut("CLEVR_v1.0.zip"), "is no whole zip archive"),
    ("clevr_count", edit_zip("CLEVR_v1.0.zip", drop_scene), "holds 30 images in images/val and 29 scenes"),
    (
        "clevr_count",
        edit_zip("CLEVR_v1.0.zip", set_scene(objects=[{}] * 2)),
        "CLEVR_train_000000.png .* label -1, but",
    ),
    (
        "clevr_distance",
        edit_zip("CLEVR_v1.0.zip", set_scene(objects=[{"pixel_coords": [1]}])),
        "not a list of scenes",
    ),
    ("clevr_distance", edit_zip("CLEVR_v1.0.zip", set_scene(objects=[])), "not a list of scenes"),
    ("dmlab", cut("dmlab-test.tfrecord-00001-of-00002"), r"is cut (in the record )?at byte"),
    ("dmlab", flip("dmlab-test.tfrecord-00000-of-00002", 60), "record at byte 12 does not have its checksum"),
    ("dmlab", flip("dmlab-test.tfrecord-00000-of-00002", 3), "length at byte 0 does not have its checksum"),
    (
        "dmlab",
        lambda f: write_records(f / "dmlab-train.tfrecord", [b"none"]),
        "record at byte 12 is none of DMLab's",
    ),
    (
        "dmlab",
        lambda f: write_records(f / "dmlab-train.tfrecord", [example_bytes(RECORD)]),
        "it has not one filename, label and image",
    ),
    (
        "dmlab",
        lambda f: write_records(f / "dmlab-train.tfrecord", [example_bytes({**RECORD, "label": -1})]),
        "a.jpg of train has the label -1",
    ),
    ("kitti_distance", remove("devkit_object.zip"), "holds no mapping/train_rand.txt; put devkit_object.zip"),
    (
        "kitti_distance",
        remove("data_object_label_2.zip"),
        "holds no training/label_2/.*; vtab/kitti_distance reads",
    ),
    (
        "kitti_distance",
        edit_zip(
            "data_object_label_2.zip", lambda f: f.update({"training/label_2/000000.txt": b"Car 1 2\n"})
        ),
        "000000.txt in .* has the line 'Car 1 2', not one of 15 fields",
    ),
    (
        "kitti_distance",
        edit_zip("devkit_object.zip", lambda f: f.update({"mapping/train_rand.txt": b"1,2,99999"})),
        "names line 99999 of train_mapping.txt, which has 90 lines",
    ),
    (
        "kitti_distance",
        edit_zip("data_object_image_2.zip", lambda f: f.pop("training/image_2/000044.png")),
        "holds no training/image_2/000044.png",
    ),
    ("smallnorb_azimuth", cut(f"{NORB}-dat.mat.gz"), "dat.mat.gz is cut or damaged"),
    (
        "smallnorb_azimuth",
        lambda f: write_norb(f / f"{NORB}-info.mat.gz", np.zeros((30, 4), np.uint8)),
        "not .n, 4. int32",
    ),
    (
        "smallnorb_azimuth",
        lambda f: write_norb(f / f"{NORB}-info.mat.gz", np.zeros((29, 4), "<i4")),
        "30 images, but 29 labels",
    ),
    (
        "smallnorb_azimuth",
        write(f"{NORB}-info.mat.gz", gzip.compress(bytes(99))),
        "does not begin as a smallNORB matrix",
    ),
    (
        "smallnorb_azimuth",
        remove(f"{NORB}-dat.mat.gz"),
        "holds no smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat",
    ),
    (
        "smallnorb_elevation",
        lambda f: write_norb(f / f"{NORB}-info.mat.gz", np.full((30, 4), 9, "<i4")),
        "the label 9, but",
    ),
]


@pytest.mark.parametrize(("name", "change", "sentence"), CASES, ids=[f"{n}-{s[:30]}" for n, _, s in CASES])
def test_what_is_wrong_in_a_source_is_refused(tmp_path: Path, name: str, change, sentence: str) -> None:
    """test_vtab_packing.py packs the same sources without the change."""
    raw = make_raw(name, tmp_path / "raw", 3 if name == "retinopathy" else 30)
    change(tmp_path / "raw")
    with pytest.raises(DataError, match=sentence):
        packed(raw, tmp_path / "out", name)


@pytest.mark.parametrize(
    ("name", "module", "limit"), [("dtd", "archives", 100_000), ("smallnorb_azimuth", "norb", 1000)]
)
def test_what_would_unpack_to_more_than_memory_holds_is_refused(
    tmp_path: Path, monkeypatch, name: str, module: str, limit: int
) -> None:
    raw = make_raw(name, tmp_path / "raw", 30)
    monkeypatch.setattr(f"vitscale.curate.pack.vtab.{module}.MAX_HELD_BYTES", limit)
    with pytest.raises(DataError, match=f"holds more than {limit:,} bytes"):
        packed(raw, tmp_path / "out", name)


def test_an_image_that_a_list_names_and_the_source_lacks_is_refused(tmp_path: Path) -> None:
    raw = make_raw("sun397", tmp_path / "raw", 6)
    key = list(raw.examples["test"])[3]
    place = raw.source / key[1:]
    content = place.read_bytes()
    place.unlink()
    with pytest.raises(
        DataError, match=r"holds no .*, which the list of its split names \(1 of 6 are missing\)"
    ):
        packed(raw, tmp_path / "out", "sun397")
    place.write_bytes(content)
    assert packed(raw, tmp_path / "out", "sun397").num_samples["test"] == 6
    place.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"sun_c00003.jpg: its content cannot be decoded"):
        packed(raw, tmp_path / "other", "sun397")


@pytest.mark.parametrize(
    ("name", "other", "sentence"),
    [
        ("flowers102", "eurosat", "holds no CLASS/CLASS_1.jpg; vtab/eurosat reads EuroSAT.zip"),
        ("eurosat", "dtd", "holds no labels/train1.txt; vtab/dtd reads dtd-r1.0.1.tar.gz"),
        ("svhn", "smallnorb_azimuth", "holds no smallnorb"),
        ("svhn", "sun397", "holds no sun397_tfds_tr.txt; --membership takes the folder of"),
        ("eurosat", "clevr_count", "holds no scenes/CLEVR_train_scenes.json"),
        ("pets", "dmlab", "holds no dmlab-train.tfrecord"),
    ],
)
def test_the_format_of_another_data_set_is_refused(
    tmp_path: Path, name: str, other: str, sentence: str
) -> None:
    raw = make_raw(name, tmp_path / "raw")
    assert packed(raw, tmp_path / "right", name).num_samples
    with pytest.raises(DataError, match=sentence):
        packed(raw, tmp_path / "out", other)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("vtab/")])
def test_a_source_that_is_missing_or_empty_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("none", "empty"):
        with pytest.raises(DataError, match=r"holds no|cannot be read"):
            pack(str(tmp_path / source), tmp_path / "out", PackConfig(format=name))


def test_the_members_of_caltech_must_be_in_the_source(tmp_path: Path) -> None:
    raw = make_raw("caltech101", tmp_path / "raw")
    (tmp_path / "list.txt").write_text("ant/image_0001.jpg\nant/image_9999.jpg\n")
    for membership, sentence in (
        ("list.txt", "names ant/image_9999.jpg, which"),
        ("none.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=sentence):
            packed(Raw(raw.source, {}, str(tmp_path / membership)), tmp_path / "out", "caltech101")


def test_the_option_membership_belongs_to_three_formats(tmp_path: Path, capsys) -> None:
    with pytest.raises(
        ConfigError, match=r"--membership belongs to --format vtab/caltech101 or .*, not vtab/dtd"
    ):
        PackConfig(format="vtab/dtd", membership="list.txt")
    with pytest.raises(ConfigError, match="--format vtab/imagenet is none of imagefolder"):
        PackConfig(format="vtab/imagenet")
    assert PackConfig(format="vtab/sun397", membership="lists").format == "vtab/sun397"
    with pytest.raises(SystemExit):
        main(["pack", str(tmp_path), str(tmp_path / "out"), "--format", "vtab/imagenet"])
    assert "invalid choice: 'vtab/imagenet'" in capsys.readouterr().err


def test_a_large_compressed_archive_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "SUN397.tar.gz"
    with open(path, "wb") as file:
        file.write(b"\x1f\x8b\x08" + bytes(5))
        os.truncate(path, 2 << 30)  # a hole
    raw = make_raw("sun397", tmp_path / "raw", 4)
    with pytest.raises(
        DataError, match=r"decompress it: gzip -dc .*SUN397.tar, or unpack it and name the folder"
    ):
        packed(Raw(path, {}, raw.membership), tmp_path / "out", "sun397")
    os.rename(raw.source, tmp_path / "SUN397")  # beside the archive, its folder is read
    assert (
        packed(Raw(tmp_path, {}, raw.membership), tmp_path.parent / "vtab_out", "sun397").num_samples["test"]
        == 4
    )
