"""Files that appear whole, and what a disk that refuses them leaves."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.errors import ConfigError, StoreError
from vitscale.system import atomic


@pytest.fixture
def full() -> Iterator[None]:
    """No file of more than 100 bytes can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_is_named_and_the_file_stays_as_it_was(tmp_path: Path, full: None) -> None:
    atomic.write(tmp_path / "time.json", b"before")
    with pytest.raises(OSError, match="File too large") as refused:
        atomic.write(tmp_path / "time.json", bytes(1000))
    assert refused.value.filename == str(tmp_path / "time.json")
    assert (tmp_path / "time.json").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_a_file_system_may_refuse_to_sync_its_folders_but_no_file() -> None:
    atomic.sync_folder("/proc")
    with pytest.raises(OSError, match="Invalid argument"):
        atomic._sync(Path("/proc/version"))


def test_another_error_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, atomic.named(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert missing.value.filename == str(tmp_path / "b")


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    """In one process, as in containers on several hosts, they have the same process id."""
    path = tmp_path / "time.json"
    with atomic.appearing(path) as first:
        first.write_bytes(b"first")
        atomic.write(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    for name in (".time.json.tmp-12", ".time.json.tmp-7fa2", ".model.npz.tmp-12", "time.json"):
        (tmp_path / name).touch()
    atomic.clean(tmp_path / "time.json")
    assert {path.name for path in tmp_path.iterdir()} == {".model.npz.tmp-12", "time.json"}


@pytest.mark.parametrize(
    ("path", "kind", "sentence"),
    [
        ("HERE", ConfigError, r"is a folder; name a file in it, like .*/out\.json"),
        ("HERE/train-000000.tar", ConfigError, r"train-000000\.tar does not end in \.json; name a file that"),
        ("HERE/train-000000.tar/a.json", StoreError, r"a\.json cannot be written \((Not a d|File ex).*; n"),
        ("HERE/long/" + "a" * 300 + ".json", StoreError, r"a\.json cannot be written \(File name too long\)"),
        ("/proc/a.json", StoreError, r"^/proc/a\.json cannot be written \(.*\); name another file$"),
    ],
    ids=["a folder", "a shard", "in a file", "too long", "where no file can be made"],
)
def test_what_could_not_be_written_at_the_end_is_refused_at_the_start(
    tmp_path: Path, path: str, kind: type[Exception], sentence: str
) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"images")
    path = path.replace("HERE", str(tmp_path))
    with pytest.raises(kind, match=sentence):
        atomic.check_writable(path, ".json")
    if kind is StoreError:
        with pytest.raises(StoreError, match=r"; name another folder$"):
            atomic.check_folder(path if "long" in path else Path(path).parent)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["train-000000.tar"]
    assert (tmp_path / "train-000000.tar").read_bytes() == b"images"


def test_a_check_leaves_only_the_folder(tmp_path: Path) -> None:
    atomic.check_writable(tmp_path / "new" / "a.json", ".json")
    atomic.check_folder(tmp_path / "new" / "features")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["features"]
