"""A checkpoint cut for another number of ranks holds the same; what does harm is refused."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from make import FIXED, STATES, state_of, verified, write_step
from safetensors.torch import load_file

from tools.checkpoint import main
from vitscale.checkpoint import reshard as resharding
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.reshard import piece, reshard
from vitscale.engine.fragments import UNTRAINED


@pytest.mark.parametrize("world_size", [1, 2, 7, 100])
def test_every_state_of_every_tensor_is_the_same_at_any_world_size(tmp_path: Path, world_size: int) -> None:
    source, tensors = write_step(tmp_path / "run", 12, state_of(12)), state_of(12)
    out = reshard(str(tmp_path / "run"), str(tmp_path / "deep" / "out"), world_size)
    manifest = verified(out)
    reader = FragmentReader(out, manifest)
    for (state, name), tensor in tensors.items():
        whole = reader.whole(name, state)
        assert whole.dtype == tensor.dtype and torch.equal(whole, tensor)
    before = verified(source)
    changed = {"world_size", "zero_stage", "files", "tensors"}
    for field in dataclasses.fields(before):
        if field.name not in changed:
            assert getattr(manifest, field.name) == getattr(before, field.name)
    assert (manifest.world_size, manifest.zero_stage, len(manifest.files)) == (world_size, 3, world_size)
    assert {name for name, info in manifest.tensors.items() if info.untrained} == set(FIXED)
    assert list((tmp_path / "deep").iterdir()) == [out]


def test_fragments_are_cut_as_zero_3_cuts_them(tmp_path: Path) -> None:
    write_step(tmp_path / "run", 12, state_of(12))
    out = reshard(str(tmp_path / "run"), str(tmp_path / "out"), 3)
    last = load_file(out / "rank-00002.safetensors")
    flat = state_of(12)["exp_avg", "patch.weight"].reshape(-1)
    assert torch.equal(last["exp_avg/patch.weight"], flat[52:])  # 26, 26 and the remaining 25 of 77
    assert last["fixed/mask"].tolist() == [True] and "fp32/scale" not in last
    assert set(last) == {
        f"{state}/{name}" for state in STATES for name in ("patch.weight", "norm.bias", "head.weight")
    } | {f"{UNTRAINED}/{name}" for name in ("pos_embed", "mask")}


@pytest.mark.parametrize(("num_values", "world_size"), [(0, 3), (1, 4), (10, 4), (12, 4), (5, 4), (7, 1)])
def test_pieces_cover_a_tensor_once(num_values: int, world_size: int) -> None:
    pieces = [piece(num_values, rank, world_size) for rank in range(world_size)]
    assert [i for start, count in pieces for i in range(start, start + count)] == list(range(num_values))
    assert all(count <= -(-num_values // world_size) for _, count in pieces)


def test_resharding_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_step(tmp_path / "run", 12, state_of(12))
    first = reshard(str(tmp_path / "run"), str(tmp_path / "first"), 2)
    reshard(str(first), str(tmp_path / "five"), 5)
    again = reshard(str(tmp_path / "five"), str(tmp_path / "again"), 2)
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_step(tmp_path / "run", 12, state_of(12))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resharding.atomic, "_sync", full)
    with pytest.raises(OSError, match="No space"):
        reshard(str(tmp_path / "run"), str(tmp_path / "out" / "step"), 2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "out", "world", "message"),
    [
        ("run", "out", 0, "--world 0 must be from 1 to 100,000"),
        ("run", "out", 100_001, "--world 100001 must be from 1 to 100,000"),
        ("run", "run", 2, "run exists and is not overwritten; choose another name"),
        ("run", "run/checkpoints/step-000000012/two", 2, "lies inside .*step-000000012"),
        ("x.safetensors", "out", 2, "x.safetensors is an export: it holds weights alone"),
        ("exported", "out", 2, "exported is an export: it holds weights alone"),
        (
            "run",
            "shipped/step-000000001",
            2,
            "is the name of another step, but .*12; write .*/shipped/step-000000012",
        ),
        ("absent", "out", 2, "absent is not a checkpoint: give a run directory"),
        ("damaged", "out", 2, "rank-00000.safetensors is damaged"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, out: str, world: int, message: str
) -> None:
    write_step(tmp_path / "run", 12, state_of(12))
    for export in ("x.safetensors", "exported/model.safetensors"):
        (tmp_path / export).parent.mkdir(exist_ok=True)
        (tmp_path / export).write_bytes(b"")
    broken = write_step(tmp_path / "damaged", 12, state_of(12)) / "rank-00000.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x7f")
    status = main(["reshard", str(tmp_path / source), str(tmp_path / out), "--world", str(world)])
    assert status == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/.*.tmp-*"))
    assert main(["reshard", str(tmp_path / "run"), str(tmp_path / "out"), "--world", "2"]) == 0


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors"])
def test_an_export_is_not_cooled_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    given = tmp_path if name == "model.safetensors" else tmp_path / name
    assert main(["cooldown", str(given), str(tmp_path / "out"), "--steps", "2"]) == 2
    assert f"{given} is an export: it holds weights alone" in capsys.readouterr().err
