"""The readers of zips, TFRecords and tf.train.Examples agree with other writers of these."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from curate.vtab.vtab_files import example_bytes, write_records

from vitscale.curate.pack.vtab.archives import ZipMember
from vitscale.curate.pack.vtab.tfrecord import crc32c, masked_crc32c, parse_example, read_records


def test_a_zip_member_is_read_in_place_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archive.writestr(f"m{method}.txt", b"text " * 100, method)
        infos = archive.infolist()
    for info in infos:
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        place = (str(path), info.header_offset, info.compress_size, info.file_size, deflated)
        assert ZipMember(*place, info.CRC, "m").read() == b"text " * 100
        with pytest.raises(ValueError, match=r"does not have|do not have the checksum"):
            ZipMember(*place, info.CRC ^ 1, "m").read()


def test_crc32c_has_the_known_answers() -> None:
    """RFC 3720, B.4; and the length of a record of one byte as TensorFlow writes it."""
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0 and masked_crc32c(b"") == 0xA282EAD8


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 4095, 4096, 4097, 4099, 20_000])
def test_records_of_any_size_are_those_that_tensorboard_writes(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    write_records(tmp_path / "x", [data, b"next"])
    content = (tmp_path / "x").read_bytes()
    records = list(read_records(io.BytesIO(content), len(content), "x"))
    assert [(record.offset, record.data) for record in records] == [(12, data), (size + 28, b"next")]


def test_examples_are_parsed_as_protobuf_writes_them() -> None:
    features = {
        "image": bytes(range(256)) * 3,
        "filename": b"a.jpg",
        "label": 5,
        "large": 2**62,
        "negative": -3,
    }
    assert parse_example(example_bytes(features)) == {name: [value] for name, value in features.items()}
    message = example_bytes({"label": 300})
    for end in range(1, len(message)):
        with pytest.raises(ValueError):
            parse_example(message[:end])
