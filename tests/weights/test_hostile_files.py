"""Hostile and damaged files are refused: headers, archives, indices; and stores that deny."""

import http.server
import json
import os
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_models import TINY, saved_model
from safetensors.torch import save_file

from vitscale.config import to_dict
from vitscale.errors import CheckpointError, StoreError
from vitscale.report.contents import open_contents
from vitscale.weights.files import Weights, find_export, write_folder
from vitscale.weights.foreign.convert import export_model, import_model
from vitscale.weights.saved import SavedModel


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    for name in ("deit.pth", "pytorch_model.bin", "x.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle, .*safetensors.torch.save_file"):
            import_model(tmp_path / name, tmp_path / "out", format="timm")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"is a pickle, .* under a key, like \['state_dict'\]"):
        import_model(tmp_path / "hub", tmp_path / "out", format="transformers")
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    arrays = dict(np.load(out).items())
    np.savez(tmp_path / "x.npz", **arrays | {"head/bias": np.array([print] * 5, dtype=object)})
    with pytest.raises(CheckpointError, match="head/bias holds Python objects, whose loading can run code"):
        import_model(tmp_path / "x.npz", tmp_path / "out", format="npz")
    np.savez(tmp_path / "x.npz", **arrays | {"head/bias": np.arange(5)})
    with pytest.raises(CheckpointError, match="head/bias is int64; save it as float32"):
        import_model(tmp_path / "x.npz", tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()
    np.savez(tmp_path / "x.npz", **arrays | {"head/bias": np.arange(5, dtype=np.float64)})
    assert import_model(tmp_path / "x.npz", tmp_path / "out", format="npz").exists()


# A safetensors file that SavedModel accepts; the tests change one thing in it.
METADATA = json.dumps({"vitscale.model": json.dumps(to_dict(TINY)), "vitscale.step": "3"})
TENSOR = '"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'


def write_header(path: Path, tensors: str, metadata: str = METADATA) -> Path:
    """A safetensors file with this header, and 64 bytes of values."""
    header = f'{{"__metadata__": {metadata}, {tensors}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    return path


@pytest.mark.parametrize(
    "tensors",
    [
        TENSOR,
        '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [40, 64]}',
        '"a": {"dtype": "F32", "shape": [0, 10], "data_offsets": [0, 0]}',
        f'{TENSOR}, "b": {{"dtype": "F32", "shape": [6], "data_offsets": [24, 48]}}',
    ],
)
def test_sound_safetensors_headers_are_accepted(tmp_path: Path, tensors: str) -> None:
    path = write_header(tmp_path / "sound.safetensors", tensors)
    assert SavedModel(path).step == 3
    assert open_contents(str(path)).facts["step"] == 3


@pytest.mark.parametrize(
    "tensors",
    [
        '"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}',
        '"a": {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}',
        '"a": {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]}',
        '"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}',
        '"a": {"dtype": "F32", "shape": [6], "data_offsets": [41, 65]}',
        '"a": {"dtype": "F32", "shape": [1000000000000000], "data_offsets": [0, 4000000000000000]}',
        f'"a": {{"dtype": "F32", "shape": [0, 1{30 * "0"}], "data_offsets": [0, 0]}}',
        '"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}',
        f'{TENSOR}, "b": {{"dtype": "F32", "shape": [6], "data_offsets": [20, 44]}}',
        f'{TENSOR}, "a": {{"dtype": "F32", "shape": [6], "data_offsets": [24, 48]}}',
        '"a": 5',
        '"a": ' + 100_000 * "[",
    ],
)
def test_hostile_safetensors_headers_are_refused(tmp_path: Path, tensors: str) -> None:
    path = write_header(tmp_path / "hostile.safetensors", tensors)
    reason = r"hostile\.safetensors (is not a safetensors file|ends inside a)"
    with pytest.raises(CheckpointError, match=reason):
        SavedModel(path)
    with pytest.raises(CheckpointError, match=reason):
        open_contents(str(path))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ('["x"]', "is not a safetensors file"),
        ('{"x": 5}', "is not a safetensors file"),
        ('{"vitscale.step": "3"}', "was not exported by vitscale"),
        ('{"vitscale.model": "{", "vitscale.step": "3"}', "has damaged metadata"),
        ('{"vitscale.model": "{}", "vitscale.step": "x"}', "has damaged metadata"),
        ('{"vitscale.model": "[]", "vitscale.step": "3"}', "names no model configuration"),
    ],
)
def test_hostile_metadata_are_refused(tmp_path: Path, metadata: str, reason: str) -> None:
    path = write_header(tmp_path / "hostile.safetensors", TENSOR, metadata)
    with pytest.raises(CheckpointError, match=rf"hostile\.safetensors {reason}"):
        SavedModel(path)


def write_index(folder: Path, file_of: dict[str, str]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return path


def test_an_index_names_the_files_beside_it(tmp_path: Path) -> None:
    saved_model(tmp_path / "beside.safetensors")
    index = write_index(tmp_path, {"norm.weight": "beside.safetensors"})
    assert "norm.weight" in open_contents(str(tmp_path)).shapes
    assert Weights(index).shapes == {"norm.weight": (32,)}


@pytest.mark.parametrize(
    ("file_of", "reason"),
    [
        ({"norm.weight": "../other.safetensors"}, r"must name files beside it, not '\.\./other.safetensors'"),
        (
            {"norm.weight": "/etc/other.safetensors"},
            "must name files beside it, not '/etc/other.safetensors'",
        ),
        ({"norm.weight": ""}, "must name files beside it, not ''"),
        ({"norm.weight": ".."}, r"must name files beside it, not '\.\.'"),
        ({}, "names no tensor"),
    ],
)
def test_an_index_that_names_others_is_refused(tmp_path: Path, file_of: dict[str, str], reason: str) -> None:
    saved_model(tmp_path / "other.safetensors")
    (tmp_path / "out").mkdir()
    write_index(tmp_path / "out", file_of)
    with pytest.raises(CheckpointError, match=reason):
        open_contents(str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=reason):
        Weights(find_export(str(tmp_path / "out")))


def test_an_index_of_shards_that_do_not_hold_its_tensors_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "beside.safetensors")
    index = write_index(tmp_path, {"nothing.weight": "beside.safetensors"})
    with pytest.raises(CheckpointError, match=r"lists nothing\.weight, which its shard does not hold"):
        Weights(index)
    with pytest.raises(CheckpointError, match=r"lists nothing\.weight, which its shard does not hold"):
        open_contents(str(tmp_path))
    index = write_index(tmp_path, {"norm.weight": "absent.safetensors"})
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        Weights(index)


class _Withholding(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder by ranges, and denies access to JSON."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.endswith(".json"):
            self.send_error(403)
            return
        data = (self.folder / self.path.strip("/")).read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part if with_body else b"")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def withholding_url(tmp_path: Path) -> Iterator[str]:
    """The URL of tmp_path over HTTP, where JSON is denied."""
    handler = type("Handler", (_Withholding,), {"folder": tmp_path})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_store_that_denies_access_is_not_reported_as_damage(tmp_path: Path, withholding_url: str) -> None:
    saved_model(tmp_path / "ours.safetensors")
    assert SavedModel(f"{withholding_url}/ours.safetensors").step == 7
    with pytest.raises(StoreError, match=r"index\.json: access is denied"):
        SavedModel(f"{withholding_url}/model.safetensors.index.json")
    with pytest.raises(StoreError, match=r"index\.json: access is denied"):
        open_contents(f"{withholding_url}/model.safetensors.index.json")
    with pytest.raises(StoreError, match=r"config\.json: access is denied"):
        import_model(f"{withholding_url}/ours.safetensors", tmp_path / "out", format="safetensors")


def compressed_npz(path: Path) -> Path:
    """An .npz file of ours, written again with compression."""
    saved_model(path.with_name("good.safetensors"))
    plain = export_model(path.with_name("good.safetensors"), path.with_name("good.npz"), format="npz")
    np.savez_compressed(path, **dict(np.load(plain).items()))
    return path


def npy(shape: str, num_bytes: int) -> bytes:
    """A .npy file whose header says float32 of this shape, over so many bytes of values."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(num_bytes)


def test_a_sound_compressed_archive_is_imported(tmp_path: Path) -> None:
    path = compressed_npz(tmp_path / "sound.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b'{"vitscale.step": "3"}'
    assert SavedModel(import_model(path, tmp_path / "out", format="npz")).step == 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        # A sound array is refused for its name alone, so the ones below are for their content.
        ("Transformer/encoderblock/x.npy", npy("(2, 3)", 24), "Transformer/encoderblock_0/x has no place"),
        ("Transformer/encoderblock/x.npy", npy("()", 4), "Transformer/encoderblock/x has no place"),
        ("Transformer/encoderblock/x.npy", npy("(1000000000000,)", 4), "is not an .npz file of arrays"),
        ("Transformer/encoderblock/x.npy", npy("(1001,)", 4 * 1001), "encoderblock/x stacks 1,001 blocks"),
        ("Transformer/encoderblock/x.npy", npy("(1000,)", 4 * 1000), "encoderblock_0/x has no place"),
        ("Transformer/encoderblock/x.npy", npy("(30000000, 0)", 4), "is not an .npz file of arrays"),
        ("Transformer/encoderblock/x.npy", npy("(-1, -1)", 4), "is not an .npz file of arrays"),
        ("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 4) + b"'''\n", "is not an .npz file of arrays"),
        # Python's parser has no memory for it, though it is short.
        ("x.npy", npy(f"({'-' * 9000}1,)", 4), "is not an .npz file of arrays"),
        ("x", npy("(2, 3)", 24), "is not an .npz file of arrays"),
    ],
)
def test_archives_with_a_hostile_member_are_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = compressed_npz(tmp_path / "hostile.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=f"hostile.npz.*{reason}"):
        import_model(path, tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()


def test_a_member_that_claims_more_bytes_than_it_can_have_is_refused(tmp_path: Path) -> None:
    path = compressed_npz(tmp_path / "hostile.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", npy("(900000000,)", 4))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rfind(b"PK\x01\x02") + 24, 0xF0000000)  # in the list of members
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not an \.npz file of arrays"):
        import_model(path, tmp_path / "out", format="npz")


def test_damaged_and_encrypted_archives_are_refused(tmp_path: Path) -> None:
    path = compressed_npz(tmp_path / "sound.npz")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.compress_size)
    flipped_header, flipped_values, encrypted = bytearray(data), bytearray(data), bytearray(data)
    for i in range(40):
        flipped_header[200 + i] ^= 0xFF  # near the beginning of the first array, compressed
        flipped_values[largest.header_offset + largest.compress_size // 2 + i] ^= 0xFF
    encrypted[data.find(b"PK\x01\x02") + 8] |= 1
    other_method = bytearray(data)
    for place in (data.find(b"PK\x03\x04") + 8, data.find(b"PK\x01\x02") + 10):
        other_method[place] = zipfile.ZIP_BZIP2
    for hostile, reason in (
        (flipped_header, "hostile.npz is not an .npz file of arrays, or is damaged"),
        (flipped_values, "hostile.npz is damaged: .* cannot be read"),
        (encrypted, "hostile.npz is not an .npz file of arrays, or is damaged"),
        (other_method, "hostile.npz is not an .npz file of arrays, or is damaged"),
        (data[:-500], "hostile.npz is not an .npz file of arrays, or is damaged"),
        (data[100:], "hostile.npz is not an .npz file of arrays, or is damaged"),  # places before 0
    ):
        (tmp_path / "hostile.npz").write_bytes(hostile)
        with pytest.raises(CheckpointError, match=reason):
            import_model(tmp_path / "hostile.npz", tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        (b'{"vitscale.step": "x"}', "the step in its metadata .* is 'x', not a number"),
        (b'{"vitscale.model": "["}', "the model in its metadata .* is damaged"),
        (b'{"vitscale.model": "[]"}', "the model in its metadata .* is damaged"),
    ],
)
def test_archives_with_hostile_metadata_are_refused(tmp_path: Path, comment: bytes, reason: str) -> None:
    path = compressed_npz(tmp_path / "hostile.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    with pytest.raises(CheckpointError, match=f"hostile.npz: {reason}"):
        import_model(path, tmp_path / "out", format="npz")


def test_damaged_and_mistaken_files_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "ours.safetensors")
    npz = export_model(tmp_path / "ours.safetensors", tmp_path / "a.npz", format="npz")
    hf = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "bit.npz", **{"resnet/root_block/standardized_conv2d/kernel": np.ones(3)})
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"net.patch_embed.proj.weight": torch.ones(1)}, tmp_path / "net.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ours.safetensors").read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    for file, format, message in (
        ("flipped.npz", "npz", "flipped.npz is damaged: .* cannot be read"),
        ("cut.npz", "npz", "cut.npz is not an .npz file of arrays, or is damaged"),
        ("bit.npz", "npz", "bit.npz: the shapes of its tensors are not those of a BiT ResNet"),
        ("none.npz", "npz", "none.npz does not exist"),
        ("x.safetensors", "timm", "holds no patch_embed.proj.weight.* these are not the weights of a ViT"),
        ("net.safetensors", "timm", "under names without 'net.' before them"),
        ("net.safetensors", "safetensors", "under names without 'net.' before them"),
        ("net.safetensors", "transformers", "use --format timm"),
        ("cut.safetensors", "safetensors", "ends inside"),
        (hf, "timm", "use --format transformers"),
        (tmp_path / "ours.safetensors", "transformers", "use --format timm"),
        ("empty", "timm", "is neither a .safetensors file nor a folder with model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_model(tmp_path / file, tmp_path / "out", format=format)
    with pytest.raises(CheckpointError, match=r"hf/model.safetensors was not exported by vitscale.*import"):
        SavedModel(hf)


def test_shards_that_are_not_of_the_index_that_was_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, pread = {"a": (3,), "b": (3,)}, os.pread
    for folder, value in (("old", 0.0), ("new", 1.0)):
        (tmp_path / folder).mkdir()
        tensors = {name: torch.full(shape, value) for name, shape in shapes.items()}
        index = write_folder(tmp_path / folder, tensors.items(), shapes, "fp32", {}, shard_bytes=12)
        os.utime(tmp_path / folder / index, (value, value))

    def replaced(*arguments: int) -> bytes:  # once the index has been read
        monkeypatch.undo()
        (tmp_path / "old").rename(tmp_path / "aside")
        (tmp_path / "new").rename(tmp_path / "old")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", replaced)
    with pytest.raises(CheckpointError, match=r"old/model.safetensors.index.json was replaced while"):
        Weights(tmp_path / "old" / index)
