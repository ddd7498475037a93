"""What is wrong in a source of a whole transfer set is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from curate.transfer.transfer_raw import make_raw
from curate.vtab.vtab_damage import cut, edit_text, remove, write
from curate.vtab.vtab_files import encoded, picture, tar_bytes, write_mat, write_zip

from tools.data import main
from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import FORMATS
from vitscale.errors import ConfigError, DataError

MAPPINGS = "objectnet-1.0/mappings"
V2 = "imagenetv2-matched-frequency.tar.gz"
VAL = "ILSVRC2012_img_val.tar"


def v2(*names: str) -> Callable[[Path], object]:
    """The archive holds images of these names instead."""
    image = encoded(picture(0, 0))
    return lambda folder: (folder / V2).write_bytes(tar_bytes(dict.fromkeys(names, image)))


def val(*names: str) -> Callable[[Path], object]:
    return lambda folder: (folder / VAL).write_bytes(tar_bytes(dict.fromkeys(names, b"\xff\xd8\xff"), "w"))


def ids(**changed: list[int]) -> Callable[[Path], object]:
    """Flowers' lists, with 90 images in three lists of 30 unless they are changed."""
    parts = {"trnid": range(1, 31), "valid": range(31, 61), "tstid": range(61, 91)} | changed
    return lambda f: write_mat(
        f / "setid.mat", **{k: np.array([list(v)], np.uint16) for k, v in parts.items()}
    )


def swap_line(folder: Path) -> None:
    path = folder / MAPPINGS / "pytorch_to_imagenet_2012_id.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"7": values["8"]}))


def no_images(folder: Path) -> None:
    for path in (folder / "objectnet-1.0" / "images" / "helmet").iterdir():
        path.unlink()


CASES = [
    ("pets", cut("images.tar.gz", 0.4), r"images.tar.gz is damaged at byte|holds no images/"),
    (
        "pets",
        remove("annotations.tar.gz"),
        "holds no annotations/trainval.txt; pets reads a folder with images",
    ),
    (
        "pets",
        write("annotations/test.txt", b"american_bulldog_201 2 1 2\n"),
        "american_bulldog_201.jpg is listed twice, in train and test; download the lists again",
    ),
    (
        "pets",
        write("annotations/test.txt", b"Abyssinian_230 38 1 1\n"),
        "Abyssinian_230.jpg has the label 37, but pets has the labels 0 to 36",
    ),
    (
        "pets",
        write("annotations/test.txt", b"Abyssinian_230 1 1 1\nSphynx_1 1 1 1\n"),
        "holds no images/Sphynx_1.jpg, which annotations/te",
    ),
    ("pets", write("annotations/test.txt", b"#Image CLASS-ID\n"), "pets has no image in test; download"),
    ("flowers102", cut("102flowers.tgz"), "102flowers.tgz is cut or damaged .*; download it again"),
    (
        "flowers102",
        remove("imagelabels.mat"),
        "holds no imagelabels.mat; flowers102 reads a folder with 102flowers",
    ),
    ("flowers102", ids(valid=[30, 31]), "image_00030.jpg is listed twice, in train and train"),
    ("flowers102", ids(tstid=[90, 91]), "names images from 90 to 91 in tstid"),
    ("imagenet_real", cut(VAL), "ILSVRC2012_img_val.tar is damaged at byte"),
    ("imagenet_real", cut("real.json"), "real.json is cut or not JSON; .* download real.json again"),
    ("imagenet_real", remove("real.json"), r"--val-labels .*real.json cannot be read \(No such file"),
    ("imagenet_real", write("real.json", b"{}"), "is not a list with a list for each image"),
    ("imagenet_real", write("real.json", b"[[1], 2]"), "has no list of classes 0 to 999 for image 2"),
    ("imagenet_real", write("real.json", b"[[1], [1000]]"), "has no list of classes 0 to 999 for image 2"),
    ("imagenet_real", write("real.json", b"[[true]]"), "has no list of classes 0 to 999 for image 1"),
    ("imagenet_real", write("real.json", b"[" * 100_000), "is cut or not JSON"),
    (
        "imagenet_real",
        write("real.json", b"[[1], [2], [3]]"),
        "holds ILSVRC2012_val_00000004.JPEG, but .*real.json has 3 lists",
    ),
    (
        "imagenet_real",
        val(*(f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3, 5, 7, 8, 9, 10, 11, 12))),
        r"holds no ILSVRC2012_val_00000004.JPEG \(2 of 12 images of .*real.json are missing\)",
    ),
    (
        "imagenet_real",
        val("train/n01440764_1.JPEG"),
        "holds no ILSVRC2012_val_00000001.JPEG; imagenet_real reads",
    ),
    (
        "imagenet_real",
        val("a/ILSVRC2012_val_00000001.JPEG", "b/ILSVRC2012_val_00000001.JPEG"),
        "holds ILSVRC2012_val_00000001.JPEG twice; keep one",
    ),
    ("imagenet_v2", cut(V2), "is cut or damaged .*; download it again"),
    ("imagenet_v2", v2("v2/n01440764/a.jpeg"), "holds no 0/IMAGE.jpeg; imagenet_v2 reads imagenetv2-matched"),
    (
        "imagenet_v2",
        v2("v2/0/a.jpeg", "v2/1000/a.jpeg"),
        "holds the folder v2/1000, which is no class number from 0",
    ),
    ("imagenet_v2", v2("v2/0/a.jpeg", "v2/007/a.jpeg"), "holds the folder v2/007, which is no class number"),
    (
        "imagenet_v2",
        v2("a/0/a.jpeg", "b/1/a.jpeg"),
        "holds class folders in a/ and in b/; name the folder of one",
    ),
    (
        "objectnet",
        no_images,
        r"holds no image in images/helmet \(1 of the 5 folders of mappings/.* have none\)",
    ),
    (
        "objectnet",
        remove(f"{MAPPINGS}/imagenet_to_label_2012_v2"),
        "holds no mappings/imagenet_to_label_2012_v2",
    ),
    (
        "objectnet",
        remove(f"{MAPPINGS}/objectnet_to_imagenet_1k.json"),
        "holds no mappings/objectnet_to_imagenet_1k.json; objectnet reads the folder objectnet-1.0",
    ),
    (
        "objectnet",
        swap_line,
        "does not give each of the 1,000 lines of mappings/imagenet_to_label_2012_v2 to one",
    ),
    (
        "objectnet",
        edit_text(f"{MAPPINGS}/imagenet_to_label_2012_v2", "plate rack\n", ""),
        "does not give each of the 999 lines",
    ),
    (
        "objectnet",
        edit_text(f"{MAPPINGS}/imagenet_to_label_2012_v2", "plate rack", "plate"),
        "has 'plate rack' for 'Drying rack for plates', which mappings/imagenet_to_label_.* does not name",
    ),
    (
        "objectnet",
        edit_text(f"{MAPPINGS}/objectnet_to_imagenet_1k.json", "plate rack", "crane"),
        "has 'crane' for 'Drying rack for plates', which mappings/imagenet_to_label_2012_v2 names twice",
    ),
    (
        "objectnet",
        edit_text(f"{MAPPINGS}/folder_to_objectnet_label.json", '"Helmet"', '"Hat"'),
        "has 'Helmet', which mappings/folder_to_objectnet_label.json does not",
    ),
    (
        "objectnet",
        cut(f"{MAPPINGS}/folder_to_objectnet_label.json"),
        "folder_to_objectnet_label.json in .* is cut",
    ),
    ("objectnet", write(f"{MAPPINGS}/pytorch_to_imagenet_2012_id.json", b"[]"), "is not a JSON object"),
    ("objectnet", write(f"{MAPPINGS}/objectnet_to_imagenet_1k.json", b'{"a": 1}'), "has no text for 'a'"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), CASES, ids=[f"{n}-{s[:30]}" for n, _, s in CASES])
def test_what_is_wrong_in_a_source_is_refused(tmp_path: Path, name: str, change, sentence: str) -> None:
    """test_transfer_packing.py packs the same sources without the change."""
    raw = make_raw(name, tmp_path)
    change(tmp_path)
    config = PackConfig(format=name, val_labels=raw.val_labels)
    with pytest.raises(DataError, match=sentence):
        FORMATS[name](str(raw.source), config)


@pytest.mark.parametrize("name", ["pets", "flowers102", "imagenet_real", "imagenet_v2", "objectnet"])
def test_a_source_that_is_not_there_is_refused_with_what_would_be_read(
    tmp_path: Path, name: str, capsys
) -> None:
    (tmp_path / "real.json").write_text("[[1]]")
    labels = ["--val-labels", str(tmp_path / "real.json")] if name == "imagenet_real" else []
    assert main(["pack", str(tmp_path / "none"), str(tmp_path / "out"), "--format", name, *labels]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/none" in error and f"{name} reads" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_encrypted_archive_of_objectnet_must_be_unzipped(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "objectnet-1.0.zip", {"objectnet-1.0/README": b"ObjectNet"})
    with pytest.raises(
        DataError, match=r"objectnet-1.0.zip is not a folder; .*unzip it with the password that obj"
    ):
        FORMATS["objectnet"](str(archive), PackConfig(format="objectnet"))


def test_an_image_that_cannot_be_decoded_ends_the_packing_by_name(tmp_path: Path, capsys) -> None:
    raw = make_raw("objectnet", tmp_path / "raw")
    images = sorted((raw.source / "images" / "helmet").iterdir())
    for name, content, reason in (
        ("cut", images[1].read_bytes()[:200], "cannot be decoded"),
        ("small", encoded(picture(0, 0, 4, 9), "PNG"), "has 9 x 4 pixels, and nothing inside its border"),
    ):
        images[1].write_bytes(content)
        command = ["pack", str(raw.source), str(tmp_path / name), "--format", "objectnet", "--workers", "0"]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{images[1]}: " in error and reason in error and "restore it" in error


def test_real_json_belongs_to_imagenet_real() -> None:
    with pytest.raises(ConfigError, match=r"imagenet_real needs --val-labels real\.json"):
        PackConfig(format="imagenet_real")
    with pytest.raises(ConfigError, match="--val-images and --val-labels belong together"):
        PackConfig(format="pets", val_labels="real.json")
    with pytest.raises(ConfigError, match="--val-images belongs to --format imagenet1k, not imagenet_real"):
        PackConfig(format="imagenet_real", val_images="val.tar", val_labels="real.json")
    assert PackConfig(format="imagenet_real", val_labels="real.json").val_labels == "real.json"
