"""CIFAR from its binary archives; the python archives are pickles, and refused unread."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pack_files import read_all, shard_bytes
from PIL import Image

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import pack
from vitscale.data.samples import RawSample
from vitscale.errors import DataError

CONFIG = PackConfig(format="cifar10", shuffle=False)


def rows(seed: int, count: int, *classes: int) -> np.ndarray:
    """Rows as published: one byte for each kind of label, below `classes`, and 3,072 pixels."""
    draws = np.random.default_rng(seed)
    labels = [draws.integers(0, num_classes, count) for num_classes in classes]
    return np.column_stack([*labels, draws.integers(0, 256, (count, 3072))]).astype(np.uint8)


BATCHES10 = {f"data_batch_{number}.bin": rows(number, 12, 10) for number in range(1, 6)}
BATCHES10["test_batch.bin"] = rows(6, 7, 10)
FILES10 = {name: batch.tobytes() for name, batch in BATCHES10.items()}
NAMES10 = "".join(f"class_{number}\n" for number in range(10)).encode() + b"\n"
BATCHES100 = {"train.bin": rows(1, 30, 20, 100), "test.bin": rows(2, 9, 20, 100)}
FILES100 = {name: batch.tobytes() for name, batch in BATCHES100.items()}


def write_archive(path: Path, files: dict[str, bytes]) -> str:
    """A .tar.gz with the files in a folder, as CIFAR is published."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def write_source(folder: Path, files: dict[str, bytes], kind: str) -> str:
    """The files as an archive, or as the folder that it unpacks to."""
    source = write_archive(folder / "cifar.tar.gz", files)
    if kind == "archive":
        return source
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return str(folder / "unpacked")


def pixels(sample: RawSample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_cifar10_is_read_from_its_archive_and_its_folder(tmp_path: Path, kind: str, workers: int) -> None:
    source = write_source(tmp_path, {**FILES10, "batches.meta.txt": NAMES10}, kind)
    config = PackConfig(format="cifar10", shuffle=False, samples_per_shard=50, workers=workers)
    report = pack(source, tmp_path / "out", config)
    assert report.num_samples == {"train": 60, "test": 7} and len(report.shards["train"]) == 2
    samples = read_all(report.shards["train"])
    batch = BATCHES10["data_batch_2.bin"]
    assert np.array_equal(pixels(samples[15]), batch[3, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert [s.labels for s in samples[12:24]] == [(label,) for label in batch[:, 0]]
    assert samples[15].key == "train_00000015_cifar10_train_15"
    assert "class_9" in (tmp_path / "out" / "classes.json").read_text()


def test_class_names_may_be_missing(tmp_path: Path) -> None:
    named = write_archive(tmp_path / "named.tar.gz", {**FILES10, "batches.meta.txt": NAMES10})
    nameless = write_archive(tmp_path / "nameless.tar.gz", FILES10)
    pack(named, tmp_path / "a", CONFIG)
    pack(nameless, tmp_path / "b", CONFIG)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert (tmp_path / "a" / "classes.json").exists()
    assert not (tmp_path / "b" / "classes.json").exists()


@pytest.mark.parametrize(("labels", "num_classes", "column"), [("coarse", 20, 0), ("fine", 100, 1)])
def test_cifar100_has_fine_and_coarse_labels(
    tmp_path: Path, labels: str, num_classes: int, column: int
) -> None:
    names = {
        f"{kind}_label_names.txt": "\n".join(f"{kind}{number}" for number in range(count)).encode()
        for kind, count in (("coarse", 20), ("fine", 100))
    }
    source = write_archive(tmp_path / "cifar.tar.gz", {**FILES100, **names})
    config = PackConfig(format="cifar100", labels=labels, shuffle=False)  # type: ignore[arg-type]
    report = pack(source, tmp_path / "out", config)
    samples = read_all(report.shards["train"])
    train = BATCHES100["train.bin"]
    assert [s.labels[0] for s in samples] == train[:, column].tolist()
    assert np.array_equal(pixels(samples[4])[:, :, 1].ravel(), train[4, 2 + 1024 : 2 + 2048])
    assert f"{labels}{num_classes - 1}" in (tmp_path / "out" / "classes.json").read_text()


class Attack:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("attacked",)


HOSTILE_PICKLES = {
    "calls a function": pickle.dumps(Attack(), protocol=2),
    "calls a function, protocol 4": pickle.dumps({"data": Attack()}, protocol=4),
    "holds one in an array": pickle.dumps(np.array([Attack()], dtype=object), protocol=2),
    "nests tuples as a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "claims a large memo": b"\x80\x02]r\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("kind", ["archive", "folder"])
@pytest.mark.parametrize("content", HOSTILE_PICKLES.values(), ids=HOSTILE_PICKLES)
def test_a_python_archive_is_refused_and_nothing_in_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    python_files = {name.removesuffix(".bin"): content for name in FILES10}
    source = write_source(tmp_path, python_files, kind)
    with pytest.raises(DataError, match=r"download cifar-10-binary.tar.gz from https://www.cs.toronto"):
        pack(source, tmp_path / "out", CONFIG)
    assert not (tmp_path / "attacked").exists()
    attack, arguments = Attack().__reduce__()
    attack(*arguments)
    assert (tmp_path / "attacked").exists()


def test_python_files_of_cifar100_are_refused_and_binary_ones_beside_them_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no train.bin; --format cifar100 reads"):
        pack(str(folder), tmp_path / "out", PackConfig(format="cifar100"))
    for name in ("train", "test"):
        (folder / name).rmdir()
        (folder / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match=r"download cifar-100-binary.tar.gz from"):
        pack(str(folder), tmp_path / "out", PackConfig(format="cifar100"))
    for name, content in FILES100.items():
        (folder / name).write_bytes(content)
    report = pack(str(folder), tmp_path / "out", PackConfig(format="cifar100"))
    assert report.num_samples == {"train": 30, "test": 9}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data_batch_3.bin": None}, "holds no data_batch_3.bin; --format cifar10 reads cifar-10-binary"),
        ({"data_batch_3.bin": b"x" * 3074}, "3,074 bytes, not a multiple of 3,073"),
        ({"data_batch_3.bin": b""}, "0 bytes, not a multiple"),
        ({"data_batch_3.bin": rows(3, 50, 11).tobytes()}, "has the label 10, but 10 classes"),
        ({"batches.meta.txt": b"cat\ndog\n"}, "names 2 classes, not 10"),
    ],
    ids=["missing", "cut", "empty", "label", "names"],
)
def test_what_is_not_cifar_is_refused(tmp_path: Path, change: dict[str, bytes | None], sentence: str) -> None:
    files = {**FILES10, "batches.meta.txt": NAMES10}
    assert pack(write_archive(tmp_path / "a.tar.gz", files), tmp_path / "a", CONFIG).num_samples
    changed = {name: content for name, content in {**files, **change}.items() if content is not None}
    source = write_archive(tmp_path / "b.tar.gz", changed)
    with pytest.raises(DataError, match=sentence):
        pack(source, tmp_path / "b", CONFIG)


def test_an_archive_that_is_cut_or_missing_is_refused(tmp_path: Path) -> None:
    source = Path(write_archive(tmp_path / "cifar.tar.gz", FILES10))
    assert pack(str(source), tmp_path / "whole", CONFIG).num_samples == {"train": 60, "test": 7}
    source.write_bytes(source.read_bytes()[:-5000])
    for path in (source, tmp_path / "none.tar.gz"):
        with pytest.raises(DataError, match="cannot be read as a folder or tar archive"):
            pack(str(path), tmp_path / "out", CONFIG)
