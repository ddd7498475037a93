"""Packing: what goes in comes out, deterministic, nothing dropped in silence."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import jpeg

from vitscale.config import ConfigError
from vitscale.data.index import build_index
from vitscale.data.pack import cifar10, imagefolder
from vitscale.data.pack.demo import COLOURS, KINDS, digit_samples, shape_samples
from vitscale.data.pack.writer import write_shards
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample


def make_samples(count: int) -> list[RawSample]:
    return [RawSample(f"k{n:03d}", jpeg(n), "jpg", (n % 3,) if n % 2 else (1, n)) for n in range(count)]


def test_shards_hold_what_was_written_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = write_shards(make_samples(25), tmp_path / "a", "train", samples_per_shard=10)
    assert [Path(path).name for path in paths] == [f"train-{n:06d}.tar" for n in range(3)]
    index = build_index(paths)
    read = list(read_samples(index, range(25)))
    assert [(s.key, s.image, s.labels) for s in read] == [
        (s.key, s.image, s.labels) for s in make_samples(25)
    ]
    again = write_shards(make_samples(25), tmp_path / "b", "train", samples_per_shard=10)
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(paths, again, strict=True))


def test_a_folder_that_holds_shards_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_shards(make_samples(3), tmp_path, "train")
    with pytest.raises(ConfigError, match="already holds 1 shards"):
        write_shards(make_samples(3), tmp_path, "train")
    write_shards(make_samples(3), tmp_path, "train", overwrite=True)


def test_a_kill_while_packing_leaves_no_shard_under_a_final_name(tmp_path: Path) -> None:
    def dies_after_five():
        yield from make_samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(dies_after_five(), tmp_path, "train", samples_per_shard=2)
    assert not list(tmp_path.glob("train-*.tar"))
    assert len(write_shards(make_samples(5), tmp_path, "train", samples_per_shard=2)) == 3
    assert not list(tmp_path.glob(".*"))


def test_class_folders_become_labels_and_other_files_are_reported(tmp_path: Path, caplog) -> None:
    for split, names in (("train", ("cat", "ant")), ("val", ("cat",))):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"x.{number}.JPG").write_bytes(jpeg(number))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("hello")
    splits = imagefolder.find_splits(tmp_path)
    classes = imagefolder.class_names(splits["train"])
    assert list(splits) == ["train", "val"] and classes == ["ant", "cat"]
    shuffled = list(imagefolder.read_folder(splits["train"], classes, "train", seed=0))
    assert sorted(s.labels for s in shuffled) == [(0,)] * 4 + [(1,)] * 4
    assert "1 files are not images" in caplog.text and "notes.txt" in caplog.text
    assert len({s.key for s in shuffled}) == 8 and all("." not in s.key for s in shuffled)
    assert [s.labels for s in imagefolder.read_folder(splits["val"], classes, "val", seed=None)] == [(1,)] * 4
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(ConfigError, match="'dog', which the training split does not have"):
        list(imagefolder.read_folder(splits["val"], classes, "val", seed=None))


def test_cifar10_is_read_from_its_binary_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = {
        name: rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        for split in cifar10.BATCHES.values()
        for name in split
    }
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, rows in records.items():
            rows[:, 0] %= 10
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.nbytes
            archive.addfile(info, io.BytesIO(rows.tobytes()))
    samples = list(cifar10.read_split(tmp_path / "cifar-10-binary.tar.gz", "train", seed=None))
    assert len(samples) == 20
    row = records["data_batch_1.bin"][2]
    pixels = np.asarray(Image.open(io.BytesIO(samples[2].image)))
    assert samples[2].labels == (row[0],) and np.array_equal(
        pixels, row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
    )
    shuffled = list(cifar10.read_split(tmp_path / "cifar-10-binary.tar.gz", "train", seed=1))
    assert {s.image for s in shuffled} == {s.image for s in samples}
    assert [s.image for s in shuffled] != [s.image for s in samples]
    with pytest.raises(
        ConfigError, match=r"holds no data_batch_1.bin; --format cifar10 reads the binary version"
    ):
        list(cifar10.read_split(tmp_path, "train", seed=None))


def test_demo_shapes_are_deterministic_and_their_labels_cover_all_classes() -> None:
    samples = list(shape_samples(0, 400, "class"))
    assert [s.image for s in samples[:20]] == [s.image for s in shape_samples(0, 20, "class")]
    assert {s.labels[0] for s in samples} == set(range(len(KINDS) * len(COLOURS)))
    for label in ("count", "position", "orientation"):
        assert {s.labels[0] for s in shape_samples(1, 60, label)} == {0, 1, 2, 3}
    assert Image.open(io.BytesIO(samples[0].image)).size == (48, 48)


def test_demo_digits_are_all_of_scikit_learns_once() -> None:
    keys = [s.key for split in ("train", "test") for s in digit_samples(split)]
    assert len(keys) == len(set(keys)) == 1797


def test_the_tool_packs_indexes_and_verifies(tmp_path: Path, capsys) -> None:
    from tools.data import main

    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(jpeg(number))
    out = tmp_path / "shards"
    assert main(["pack", str(tmp_path / "photos"), str(out)]) == 0
    assert json.loads((out / "classes.json").read_text()) == ["a", "b"]
    assert main(["verify", str(out / "index.json")]) == 0
    assert main(["stats", str(out / "index.json")]) == 0
    assert main(["index", str(out / "train-*.tar")]) == 0
    assert "10 samples in 1 shards" in capsys.readouterr().out
    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert main(["verify", str(out / "index.json")]) == 2
    assert main(["index", str(out / "train-*.tar")]) == 2
    assert main(["index", str(out / "none-*.tar")]) == 2
    assert main(["index", str(out)]) == 2
    assert main(["stats", str(out)]) == 2
    assert main(["demo", str(shard / "below_a_file")]) == 2
    errors = capsys.readouterr().err
    assert "it was cut" in errors and "no file matches" in errors and "Traceback" not in errors
