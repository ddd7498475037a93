"""Safetensors files: aligned headers, sizes that 64 bits hold, reads that are cut short."""

import os
from pathlib import Path

import pytest
import torch

from vitscale.checkpoint.safetensors import SafetensorsReader, sizes, write_safetensors


def test_a_safetensors_file_without_tensors_is_read_and_its_header_is_aligned(tmp_path: Path) -> None:
    for note in ("", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg"):
        write_safetensors(tmp_path / "x.safetensors", {}, {"note": note})
        data = (tmp_path / "x.safetensors").read_bytes()
        assert len(data) % 8 == 0
        reader = SafetensorsReader(tmp_path / "x.safetensors")
        assert reader.header == {} and reader.metadata == {"note": note}


def test_sizes_are_counts_that_64_bits_can_hold() -> None:
    for values in ([], [0], [3, 4], [1] * 70, [2**62], [2**31, 2**31]):
        assert sizes(values) == tuple(values)
    for values in ([-1], [True], [1.0], (3,), 3, [2**62 + 1], [2**31, 2**31, 2], [0, 2**63]):
        with pytest.raises(ValueError):
            sizes(values)


def test_a_read_that_the_system_cuts_short_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(100)
    write_safetensors(tmp_path / "x.safetensors", {"a": values}, {})
    reader, preadv, destination = SafetensorsReader(tmp_path / "x.safetensors"), os.preadv, torch.empty(50)
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    reader.read_into(destination, "a", 20)
    assert torch.equal(destination, values[20:70])
