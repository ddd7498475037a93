"""Files that appear whole, and what a disk that refuses them leaves."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale import atomic


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


def test_another_error_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, atomic.named(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert missing.value.filename == str(tmp_path / "b")


def test_what_killed_writers_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    for name in (".time.json.tmp-12", ".time.json.tmp-7", ".model.npz.tmp-12", "time.json"):
        (tmp_path / name).touch()
    atomic.clean(tmp_path / "time.json")
    assert {path.name for path in tmp_path.iterdir()} == {".model.npz.tmp-12", "time.json"}
