"""Tar archives as the world writes them, and the damage in them."""

import io
import tarfile
from pathlib import Path

import pytest
from make import jpeg, write_tar

from vitscale.data.indexing import build_index
from vitscale.data.reader import read_samples
from vitscale.data.tar import Member, TarDamage, walk

FOLDERS_OF_154 = "deep/" * 30 + "deep"  # ustar has 155 bytes for the folders, and 100 for the name


def write_archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], tar_format: int) -> Path:
    """A tar in any format, of members of any type."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("tar_format", "key"),
    [
        (tarfile.USTAR_FORMAT, f"{FOLDERS_OF_154}/{'n' * 95}"),
        (tarfile.USTAR_FORMAT, f"d/{'n' * 95}"),
        (tarfile.USTAR_FORMAT, f"{'ü' * 70}/{'ü' * 40}"),  # a sum of bytes above 32,767
        (tarfile.GNU_FORMAT, "deep/" * 60 + "ünïcode"),
        (tarfile.PAX_FORMAT, "deep/" * 60 + "ünïcode"),
    ],
)
def test_long_names_are_read(tmp_path: Path, tar_format: int, key: str) -> None:
    members = [(tarfile.TarInfo(f"{key}.jpg"), jpeg(0)), (tarfile.TarInfo(f"{key}.cls"), b"1")]
    index = build_index([str(write_archive(tmp_path / "x.tar", members, tar_format))])
    assert [sample.key for sample in read_samples(index, [0])] == [key]


def header_with(size: bytes) -> bytes:
    """A header whose size field holds these 12 bytes, and whose checksum is right."""
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base_256(number: int) -> bytes:
    return b"\x80" + number.to_bytes(11, "big")


@pytest.mark.parametrize("size", [b"00000000017\0", b"000000000017", b"000000017 \0\0", base_256(15)])
def test_sizes_are_read_in_every_spelling(size: bytes) -> None:
    data = header_with(size) + b"fifteen letters" + bytes(497)
    assert list(walk(io.BytesIO(data), whole=False)) == [Member("x.jpg", 0, b"fifteen letters")]


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (base_256(256 << 20), "ends inside this file"),
        (base_256((256 << 20) + 1), "a member of 268,435,457 bytes; at most 268,435,456 are allowed"),
        (b"0000000001x\0", "a header that is not a tar header"),
        (b"-0000000001\0", "a member of -1 bytes"),
    ],
)
def test_a_size_that_cannot_be_is_damage(size: bytes, sentence: str) -> None:
    with pytest.raises(TarDamage, match=sentence):
        list(walk(io.BytesIO(header_with(size)), whole=False))


def test_an_empty_file_does_not_hide_what_follows(tmp_path: Path) -> None:
    members = [("a.txt", b""), ("a.jpg", jpeg(0)), ("a.cls", b"0"), ("b.jpg", jpeg(1)), ("b.cls", b"1")]
    index = build_index([str(write_tar(tmp_path / "x.tar", members))])
    assert [sample.labels for sample in read_samples(index, [0, 1])] == [(0,), (1,)]


def test_folders_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    file = tarfile.TarInfo("deep/x.jpg")
    path = write_archive(tmp_path / "x.tar", [(folder, b""), (file, b"data")], tarfile.USTAR_FORMAT)
    with open(path, "rb") as stream:
        assert list(walk(stream, whole=True)) == [Member("deep/x.jpg", 512, b"data")]


@pytest.mark.parametrize("member_type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_or_a_device_is_damage(tmp_path: Path, member_type: bytes) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.type, info.linkname = member_type, "/etc/passwd"
    path = write_archive(tmp_path / "x.tar", [(info, b"")], tarfile.USTAR_FORMAT)
    with open(path, "rb") as stream, pytest.raises(TarDamage, match="regular files only"):
        list(walk(stream, whole=True))
