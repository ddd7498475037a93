"""CIFAR from its published archives; pickles are read, never run."""

import io
import os
import pickle
import pickletools
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from vitscale.config import ConfigError
from vitscale.data.index import build_index
from vitscale.data.pack.array_pickle import PickleRefused, read_array_pickle
from vitscale.data.pack.config import PackConfig
from vitscale.data.pack.run import pack
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample


class Python2Pickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Writes what Python 2's cPickle wrote in protocol 2: text and array data as byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        length = len(data)
        head = b"U" + bytes([length]) if length < 256 else b"T" + length.to_bytes(4, "little")
        self.write(head + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def batch(seed: int, count: int, classes: int = 10) -> dict[str, object]:
    draws = np.random.default_rng(seed)
    return {
        "batch_label": f"training batch {seed} of 5",
        "labels": draws.integers(0, classes, count).tolist(),
        "data": draws.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"leptodactylus_pentadactylus_s_{number:06d}.png" for number in range(count)],
    }


def write_archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def read_all(shards: list[str]) -> list[RawSample]:
    index = build_index(shards)
    return list(read_samples(index, range(index.num_samples)))


def pixels(sample: RawSample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image)))


CIFAR10 = {**{f"data_batch_{number}": batch(number, 12) for number in range(1, 6)}, "test_batch": batch(6, 7)}
NAMES10 = [f"class {number}" for number in range(10)]


@pytest.mark.parametrize("folder", [False, True])
def test_cifar10_is_read_from_the_python_archive(tmp_path: Path, folder: bool) -> None:
    files = {name: python2_pickle(values) for name, values in CIFAR10.items()}
    files["batches.meta"] = python2_pickle({"label_names": NAMES10, "num_vis": 3072})
    source = write_archive(tmp_path / "cifar-10-python.tar.gz", files)
    if folder:
        with tarfile.open(source) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        source = str(tmp_path / "unpacked")
    config = PackConfig(format="cifar10", shuffle=False, samples_per_shard=50, workers=2 * folder)
    report = pack(source, tmp_path / "out", config)
    assert report.num_samples == {"train": 60, "test": 7} and len(report.shards["train"]) == 2
    samples = read_all(report.shards["train"])
    rows, labels = CIFAR10["data_batch_2"]["data"], CIFAR10["data_batch_2"]["labels"]
    assert np.array_equal(pixels(samples[15]), rows[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert [s.labels for s in samples[12:24]] == [(label,) for label in labels]
    assert samples[15].key == "train_00000015_cifar10_train_15"
    assert "class 9" in (tmp_path / "out" / "classes.json").read_text()


def test_cifar10_is_read_from_the_binary_archive_to_the_same_shards(tmp_path: Path) -> None:
    binary = {
        f"{name}.bin": np.insert(values["data"], 0, values["labels"], axis=1).tobytes()
        for name, values in CIFAR10.items()
    }
    binary["batches.meta.txt"] = ("\n".join(NAMES10).replace(" ", "_") + "\n\n").encode()
    python = {name: python2_pickle(values) for name, values in CIFAR10.items()}
    config = PackConfig(format="cifar10")
    one = pack(write_archive(tmp_path / "a.tar.gz", binary), tmp_path / "a", config)
    two = pack(write_archive(tmp_path / "b.tar.gz", python), tmp_path / "b", config)
    for split in ("train", "test"):
        assert Path(one.shards[split][0]).read_bytes() == Path(two.shards[split][0]).read_bytes()
    assert "class_9" in (tmp_path / "a" / "classes.json").read_text()
    assert not (tmp_path / "b" / "classes.json").exists()  # its archive brought no names


@pytest.mark.parametrize(("labels", "classes"), [("fine", 100), ("coarse", 20)])
@pytest.mark.parametrize("python", [True, False])
def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path, labels: str, classes: int, python: bool) -> None:
    splits = {}
    for seed, split in enumerate(("train", "test")):
        values = batch(seed, 30, 20)
        values |= {"coarse_labels": values.pop("labels"), "fine_labels": list(range(70, 100))}
        splits[split] = values
    names = {
        f"{kind}_label_names": [f"{kind}{number}" for number in range(count)]
        for kind, count in (("fine", 100), ("coarse", 20))
    }
    if python:
        files = {split: python2_pickle(values) for split, values in splits.items()}
        files["meta"] = python2_pickle(names)
    else:
        files = {
            f"{split}.bin": np.column_stack([v["coarse_labels"], v["fine_labels"], v["data"]])
            .astype(np.uint8)
            .tobytes()
            for split, v in splits.items()
        }
        files |= {f"{name}.txt": "\n".join(words).encode() for name, words in names.items()}
    config = PackConfig(format="cifar100", labels=labels, shuffle=False)  # type: ignore[arg-type]
    report = pack(write_archive(tmp_path / "cifar.tar.gz", files), tmp_path / "out", config)
    samples = read_all(report.shards["train"])
    assert [s.labels[0] for s in samples] == splits["train"][f"{labels}_labels"]
    assert np.array_equal(pixels(samples[4])[:, :, 1].ravel(), splits["train"]["data"][4, 1024:2048])
    assert f"{labels}{classes - 1}" in (tmp_path / "out" / "classes.json").read_text()


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_published_instructions_are_read(order: str) -> None:
    value = {"data": np.asarray(batch(1, 3000)["data"], order=order), "labels": list(range(2000))}
    data = python2_pickle(value)
    assert {"BINSTRING", "SHORT_BINSTRING", "GLOBAL", "REDUCE", "BUILD", "APPENDS"} <= {
        instruction.name for instruction, _, _ in pickletools.genops(data)
    }
    read = read_array_pickle(data)
    assert np.array_equal(read["data"], value["data"]) and read["labels"] == value["labels"]


def test_what_python_3_writes_is_read_too() -> None:
    value = {
        b"data": np.arange(300, dtype=np.uint8).reshape(100, 3),
        b"labels": [1, 2],
        b"none": (None, True),
    }
    read = read_array_pickle(pickle.dumps(value, protocol=3))
    assert np.array_equal(read["data"], value[b"data"]) and read["labels"] == [1, 2]
    assert read["none"] == (None, True)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (pickle.dumps(Attack(), protocol=2), r"asks for posix.mkdir"),
        (pickle.dumps(Attack(), protocol=4), "the instruction"),
        (pickle.dumps(np.arange(3.0), protocol=3), "only uint8 arrays"),
        (pickle.dumps(np.array([Attack()]), protocol=3), "asks for posix.mkdir|only uint8 arrays"),
        (pickle.dumps({1, 2}, protocol=2), "asks for"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "it calls"),
        (b"\x80\x02cnumpy\ndtype\nU\x02u1\x85R}b.", "names an array but brings none"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R.", "brings none"),
        (b"\x80\x02}q\x00U\x01ah\x00s.", "damaged or of another kind"),
        (b"\x80\x02]q\x00h\x00}s.", "damaged or of another kind"),
        (python2_pickle(batch(1, 5))[:-3000], "damaged or of another kind"),
        (b"not a pickle", "damaged or of another kind"),
        (b"", "damaged or of another kind"),
        (b"\x80\x02.", "damaged or of another kind"),
    ],
)
def test_anything_else_in_a_pickle_is_refused_and_nothing_is_run(
    tmp_path: Path, monkeypatch, data: bytes, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleRefused, match=sentence):
        read_array_pickle(data)
    assert not list(tmp_path.iterdir())


def test_an_array_whose_shape_and_bytes_disagree_is_refused() -> None:
    data = pickle.dumps(np.arange(100, dtype=np.uint8), protocol=3)
    with pytest.raises(PickleRefused, match="damaged"):
        read_array_pickle(data.replace(b"Kd\x85", b"Ke\x85"))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"data_batch_1": b"x"}, "holds neither data_batch_2 nor data_batch_1.bin"),
        ({name: b"x" for name in CIFAR10}, "data_batch_1 in .* is not CIFAR's: it is damaged"),
        ({name: pickle.dumps(Attack(), 2) for name in CIFAR10}, "asks for posix.mkdir"),
        ({name: python2_pickle({"data": 3}) for name in CIFAR10}, "holds no 'data' and 'labels'"),
        ({name: python2_pickle([]) for name in CIFAR10}, "holds no dict"),
        ({name: python2_pickle(batch(1, 4, 99)) for name in CIFAR10}, "beyond 10 classes"),
        ({f"{name}.bin": b"x" * 3074 for name in CIFAR10}, "3,074 bytes, not a multiple"),
        ({f"{name}.bin": b"" for name in CIFAR10}, "0 bytes, not a multiple"),
    ],
)
def test_what_is_not_cifar_is_refused(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    source = write_archive(tmp_path / "cifar.tar.gz", files)
    with pytest.raises(ConfigError, match=sentence):
        pack(source, tmp_path / "out", PackConfig(format="cifar10"))


def test_an_archive_that_is_cut_or_missing_is_refused(tmp_path: Path) -> None:
    files = {name: python2_pickle(values) for name, values in CIFAR10.items()}
    source = Path(write_archive(tmp_path / "cifar.tar.gz", files))
    source.write_bytes(source.read_bytes()[:-5000])
    for path in (source, tmp_path / "none.tar.gz"):
        with pytest.raises(ConfigError, match="cannot be read as a folder or tar archive"):
            pack(str(path), tmp_path / "out", PackConfig(format="cifar10"))
