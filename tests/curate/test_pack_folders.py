"""Class folders as the source of a packing: splits, classes, what is refused or reported."""

from pathlib import Path

import pytest
from make import jpeg
from pack_files import packed, samples_of

from vitscale.errors import DataError


def test_class_folders_become_labels_and_other_files_are_reported(tmp_path: Path) -> None:
    for split, names in (("train", ("cat", "ant")), ("val", ("cat",))):
        for name in names:
            folder = tmp_path / "photos" / split / name / "deeper"
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"x.{number}.JPG").write_bytes(jpeg(number))
    (tmp_path / "photos" / "train" / "cat" / "notes.txt").write_text("hello")
    (tmp_path / "photos" / "train" / "cat" / "up").symlink_to(tmp_path / "photos" / "train")
    (tmp_path / "photos" / "train" / ".cache").mkdir()
    report = packed(tmp_path / "photos", tmp_path / "out", workers=2)
    assert report.num_samples == {"train": 8, "val": 4}
    assert [s.labels for s in samples_of(report)] == [(0,)] * 4 + [(1,)] * 4
    assert [s.labels for s in samples_of(report, "val")] == [(1,)] * 4
    assert report.num_omissions == 1 and "notes.txt" in report.omissions[0]
    (tmp_path / "photos" / "validation").mkdir()
    (tmp_path / "photos" / "train" / "loose.jpg").write_bytes(jpeg(0))
    report = packed(tmp_path / "photos", tmp_path / "again")
    assert [Path(text.partition(":")[0]).name for text in report.omissions[1:]] == ["validation", "loose.jpg"]
    (tmp_path / "photos" / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="'dog', which the training split does not have"):
        packed(tmp_path / "photos", tmp_path / "other")


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(0))
    return folder


@pytest.mark.parametrize(
    ("folders", "refused"),
    [
        (("Training", "Testing"), True),
        (("training", "validation", "TEST"), True),
        (("Train",), True),
        (("test", "Training"), True),  # else the training images would be left out
        (("Training", "Testing", "cat"), False),
        (("valid", "invalid"), False),
        (("val", "test"), False),
    ],
)
def test_splits_are_not_taken_for_classes(tmp_path: Path, folders: tuple[str, ...], refused: bool) -> None:
    source = write_images(tmp_path / "in", *(f"{folder}/bus/1.jpg" for folder in folders))
    if refused:
        images = write_images(tmp_path / "images", "Training/1.jpg", "Testing/1.jpg")  # are classes
        assert packed(images, tmp_path / "out").num_samples == {"train": 2}
        shown = ", ".join(f"{folder}/" for folder in sorted(folders))
        with pytest.raises(
            DataError, match=f"holds {shown}, which look like splits .* rename them to train/"
        ):
            packed(source, tmp_path / "out")
    else:
        assert sum(packed(source, tmp_path / "out").num_samples.values()) == len(folders)


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_the_validation_split_of_other_tools_is_val(tmp_path: Path, name: str) -> None:
    source = write_images(tmp_path / "in", "train/bus/1.jpg", f"{name}/bus/1.jpg", "test/bus/1.jpg")
    report = packed(source, tmp_path / "out")
    assert list(report.num_samples.items()) == [("train", 1), ("val", 1), ("test", 1)]
    assert report.num_omissions == 0


@pytest.mark.parametrize("path", ["train/1.jpg", "train/steam/1.jpg"])
def test_a_class_named_like_a_split_is_refused(tmp_path: Path, path: str) -> None:
    names = (path, "bus/1.jpg", "car/1.jpg", ".hidden/1.jpg", "lists/notes.txt", "validation/bus/1.jpg")
    write_images(tmp_path, *names)
    with pytest.raises(
        DataError,
        match=r"folders of images \(bus, car\) beside the splits train, val; if one of these is a class",
    ):
        packed(tmp_path, tmp_path.parent / "out")


def test_a_source_without_class_folders_or_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for source, sentence in (
        (tmp_path / "none", "is not a folder"),
        (tmp_path / "photos", "holds no class folders"),
    ):
        with pytest.raises(DataError, match=sentence):
            packed(source, tmp_path / "out")
    (tmp_path / "photos" / "ant").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        packed(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "photos" / "ant" / "0.jpg").write_bytes(jpeg(0))
    assert packed(tmp_path / "photos", tmp_path / "out").num_samples == {"train": 1}
