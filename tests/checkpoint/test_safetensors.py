"""Safetensors files: aligned headers, sizes that 64 bits hold, reads that are cut short."""

import os
from pathlib import Path

import pytest
import torch

from vitscale.checkpoint.safetensors import SafetensorsReader, sizes, write_safetensors
from vitscale.errors import CheckpointError


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


@pytest.mark.parametrize("how", ["renamed", "written", "shorter"])
def test_a_file_that_is_replaced_after_its_header_was_read_is_refused(tmp_path: Path, how: str) -> None:
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    write_safetensors(path, {"a": torch.zeros(8), "b": torch.zeros(8)}, {})
    os.utime(path, (1, 1))  # the clock of a file system may not tell two writes apart
    reader, destination = SafetensorsReader(path), torch.empty(8)
    reader.read_into(destination, "a", 0)
    write_safetensors(new, {"a": torch.ones(8)} | ({} if how == "shorter" else {"b": torch.ones(8)}), {})
    if how == "written":
        path.write_bytes(new.read_bytes())
    else:
        new.rename(path)
    with pytest.raises(CheckpointError, match=r"x.safetensors was replaced while it was read; run the same"):
        reader.read_into(destination, "b", 0)


def test_neighbours_in_a_file_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a tensor, of two neighbours, and of others behind them, in any order."""
    tensors = {
        "a": torch.randn(10),
        "b": torch.randn(6, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.randn(9),
        "hole": torch.randn(4098),
        "e": torch.randn(2),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    reader, preadv, sizes_read = SafetensorsReader(tmp_path / "x.safetensors"), os.preadv, []

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        sizes_read.append(len(views[0]))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    wanted = [("d", 0, 9), ("b", 1, 5), ("a", 6, 4), ("b", 0, 1), ("a", 0, 2), ("mask", 0, 3), ("c", 0, 5)]
    wanted += [("hole", 0, 1), ("e", 0, 2)]
    destinations = [torch.empty(count, dtype=tensors[name].dtype) for name, _, count in wanted]
    destinations[0] = torch.empty(9, dtype=torch.float64)  # cast
    reader.read([(to, name, start) for to, (name, start, _) in zip(destinations, wanted, strict=True)])
    for destination, (name, start, count) in zip(destinations, wanted, strict=True):
        assert torch.equal(destination, tensors[name][start : start + count].to(destination.dtype))
    # a, b and mask, with a gap of 16 bytes
    # c, which is not aligned behind them
    # d, which is not aligned behind c, and a value of the hole
    # e, 16,388 bytes after that
    assert sizes_read == [40 + 48 + 3, 10, 36 + 4, 8]
