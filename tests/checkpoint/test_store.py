"""Checkpoint files on disk: written exactly, verified by checksum, kept and found by number."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from make import edit_manifest, newest, state_of, steps_on_disk, verified, write_step
from safetensors.torch import load_file

from vitscale import load_model
from vitscale.checkpoint import store
from vitscale.checkpoint.load import FragmentReader
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.safetensors import SafetensorsReader, write_safetensors
from vitscale.checkpoint.store import CheckpointConfig
from vitscale.config import to_dict
from vitscale.engine.fragments import Wanted
from vitscale.errors import CheckpointError, ConfigError
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.export import export_safetensors
from vitscale.weights.saved import SavedModel, locate

CONFIG = ViTConfig(variant="Ti/4", width=16, depth=1, num_heads=2, mlp_dim=24, image_size=8, num_classes=5)
FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The folder of a run's checkpoints; the run is tmp_path."""
    return store.directory_of(tmp_path)


def write_model(run: Path, step: int, world_size: int = 3) -> dict[str, torch.Tensor]:
    """A committed checkpoint of a model, and its weights by name."""
    model = build_model(CONFIG, seed=step)
    weights = {name: param.detach() for name, param in model.named_parameters()}
    tensors = {("fp32", name): value for name, value in weights.items()}
    config = {"model": to_dict(CONFIG)}
    write_step(run, step, tensors, world_size=world_size, slots=("fp32",), config=config)
    return weights


def test_our_safetensors_files_are_everyones(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.bfloat16), "none": torch.empty(0)}
    info = write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "note": "é"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
        for name, value in tensors.items()
    )
    assert info.num_bytes == (tmp_path / "x.safetensors").stat().st_size


def test_any_range_is_read_from_any_fragments(tmp_path: Path, directory: Path) -> None:
    state = write_model(tmp_path, 1, world_size=4)
    checkpoint = newest(directory)
    reader = FragmentReader(checkpoint.folder, checkpoint.manifest)
    name = "blocks.0.mlp.fc1.weight"
    flat = state[name].reshape(-1)
    for start, count in ((0, 1), (95, 3), (0, flat.numel()), (flat.numel() - 1, 1), (37, 200)):
        destination = torch.full((count,), torch.nan)
        reader.read_into(destination, "fp32", name, start)
        assert torch.equal(destination, flat[start : start + count])
    assert torch.equal(reader.whole(name), state[name])


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_said_to_be(tmp_path: Path, directory: Path) -> None:
    write_model(tmp_path, 1)
    checkpoint = newest(directory)
    reader = FragmentReader(checkpoint.folder, checkpoint.manifest)
    reader.whole("head.bias")
    store.delete(Path(checkpoint.folder))
    wanted = Wanted(torch.empty(1), "fp32", "head.weight", 0)
    for read in (lambda: reader.whole("blocks.0.mlp.fc1.weight"), lambda: reader.read([wanted])):
        with pytest.raises(CheckpointError, match=r"step-000000001 was deleted while it was read.* run the"):
            read()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut_off_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is damaged: its checksum"),
        (cut_off_the_end, "bytes, the manifest says"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, directory: Path, damage: Callable[[Path], None], message: str, caplog
) -> None:
    write_model(tmp_path, 1)
    write_model(tmp_path, 2)
    assert newest(directory).manifest.train.step == 2
    damage(store.step_directory(directory, 2) / SECOND)
    assert newest(directory).folder == str(store.step_directory(directory, 1))
    assert "step-000000002/rank-00001.safetensors" in caplog.text and message in caplog.text


def test_a_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path, directory: Path, sweep: bool) -> None:
    write_model(tmp_path, 1)
    path = store.step_directory(directory, 1) / "manifest.json"
    assert verified(path.parent).train.step == 1
    data = path.read_bytes()
    for position in range(0, len(data), 1 if sweep else 61):
        flipped = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="manifest"):
            verified(path.parent)


ALIEN, UNCOVERED = "was not written by vitscale", "do not hold the .* values of norm.bias once each"
Values = dict[str, Any]


def norm_bias(*fragments: list, shape: Sequence[float] = (16,)) -> Callable[[Values], object]:
    """The edit that says of norm.bias, which has 16 values, where they are."""
    return lambda values: values["tensors"]["norm.bias"].update(fragments=list(fragments), shape=list(shape))


def extra_file(name: str) -> Callable[[Values], object]:
    """The edit that lists a copy of the first file under another name."""
    return lambda values: values["files"].update({name: values["files"][FIRST]})


def nothing(_: Values) -> None:
    """The edit that leaves a manifest as it was written."""


@pytest.mark.parametrize(
    ("refused", "message", "accepted"),
    [
        (extra_file("../copy"), ALIEN, extra_file("copy")),
        (extra_file("/copy"), ALIEN, extra_file("copy")),
        (norm_bias([9, 1, 0, 16]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([-1, 1, 0, 16]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 9, 0, 4]), ALIEN, norm_bias([0, 2, 0, 8])),
        (norm_bias([0, 0, 0, 16]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0, 16], [0, 1, 0, 16]), UNCOVERED, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0, 9], [1, 1, 8, 8]), UNCOVERED, norm_bias([0, 1, 0, 8], [1, 1, 8, 8])),
        (norm_bias([0, 1, 0, 7], [1, 1, 8, 8]), UNCOVERED, norm_bias([1, 1, 8, 8], [0, 1, 0, 8])),
        (norm_bias([0, 3, 0, 5]), UNCOVERED, norm_bias([0, 2, 0, 5], [2, 1, 10, 6])),
        (norm_bias([0, 1, 0, 20], [0, 1, 20, -4]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0, 16], [0, 1, 16, 0]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0, 16.0]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, True, 0, 16]), ALIEN, norm_bias([0, 1, 0, 16])),
        (norm_bias([0, 1, 0, 16], shape=(-4, -4)), ALIEN, norm_bias([0, 1, 0, 16], shape=(4, 4))),
        (norm_bias([0, 1, 0, 10**15], shape=(10**15,)), ALIEN, norm_bias([0, 1, 0, 9], shape=(9,))),
        (norm_bias([0, 1, 0, 16], shape=(16.0,)), ALIEN, norm_bias([0, 1, 0, 16])),
        (lambda v: v.update(tensors=[]), ALIEN, lambda v: v.update(tensors={})),
        (lambda v: v["files"].update({FIRST: 5}), ALIEN, nothing),
        (lambda v: v["train"].update(config=[]), ALIEN, lambda v: v["train"].update(config={})),
        (lambda v: v["train"].update(step="3"), ALIEN, lambda v: v["train"].update(step=3)),
        (lambda v: v.update(created=5), ALIEN, lambda v: v.update(created="5")),
        (lambda v: v.update(evil=1), "manifest.json has the key evil, which this vitscale", nothing),
        (lambda v: v["train"].pop("step"), ALIEN, nothing),
        (lambda v: v["train"].update(step=4), "holds the manifest.json of step 4: rename it", nothing),
        (lambda v: v.pop("version"), "of version None", nothing),
    ],
)
def test_a_hostile_manifest_with_a_right_checksum_is_refused(
    tmp_path: Path,
    directory: Path,
    refused: Callable[[Values], object],
    message: str,
    accepted: Callable[[Values], object],
) -> None:
    write_model(tmp_path, 3)
    manifest = store.step_directory(directory, 3) / "manifest.json"
    written = manifest.read_bytes()
    shutil.copy(manifest.with_name(FIRST), manifest.with_name("copy"))
    edit_manifest(manifest, accepted)
    assert newest(directory).manifest.train.step == 3
    manifest.write_bytes(written)
    edit_manifest(manifest, refused)
    with pytest.raises(CheckpointError, match=message):
        newest(directory)


def test_a_step_under_the_name_of_another_is_passed_over(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, 3)
    copy = store.step_directory(directory, 9)
    shutil.copytree(store.step_directory(directory, 3), copy)
    assert newest(directory).folder == str(store.step_directory(directory, 3))
    assert f"{copy} holds the manifest.json of step 3: rename it or delete it" in caplog.text
    shutil.copytree(copy, tmp_path / "step-5")  # not a name of ours: it claims nothing
    assert verified(tmp_path / "step-5").step == 3


def test_a_link_that_leads_nowhere_is_named_and_does_not_stop_the_next_save(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, 3)
    link = store.step_directory(directory, 9)
    link.symlink_to(tmp_path / "gone")
    assert newest(directory).passed_over == (str(link),)
    assert f"{link} is a link to {tmp_path}/gone, which does not exist" in caplog.text
    temporary = write_step(tmp_path / "written", 9, state_of(9))
    store.commit(Manifest.load(temporary), temporary, link)
    assert newest(directory).folder == str(link) and not link.is_symlink()
    assert not list(directory.glob(".tmp-*"))


def test_of_a_linked_step_retention_deletes_the_link_alone(tmp_path: Path, directory: Path) -> None:
    for step in (3, 4):
        write_model(tmp_path, step)
    link = store.step_directory(directory, 3)
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    assert verified(link).step == 3
    config = CheckpointConfig(keep_last=1)
    store.apply_retention(store.Home(directory), config, (), lambda folder: True)
    assert steps_on_disk(directory) == [4] and verified(tmp_path / "elsewhere").step == 3
    assert not list(directory.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["manifest.json", SECOND])
def test_a_fifo_in_a_checkpoint_is_not_waited_for(
    tmp_path: Path, directory: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, 1)
    write_model(tmp_path, 2)
    path = store.step_directory(directory, 2) / name
    path.unlink()
    os.mkfifo(path)
    assert newest(directory).folder == str(store.step_directory(directory, 1))
    assert f"{path} is a FIFO, a socket or a device, not a file" in caplog.text
    with pytest.raises(CheckpointError, match="is a FIFO"):
        SafetensorsReader(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda train: train.update(mood=1), "manifest.json has the key train.mood, which"),
        (lambda train: train["config"]["model"].update(mood=1), "holds a config that"),
    ],
)
def test_what_a_newer_version_wrote_is_named_with_that_version(
    tmp_path: Path, directory: Path, edit: Callable[[Values], object], message: str
) -> None:
    write_model(tmp_path, 3)
    folder = store.step_directory(directory, 3)
    edit_manifest(folder / "manifest.json", lambda v: v["train"]["versions"].update(vitscale="0.9.0"))
    load_model(folder)
    edit_manifest(folder / "manifest.json", lambda v: edit(v["train"]))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(folder)
    assert "use the version that wrote it, or a later one" in str(raised.value)
    assert all(part in str(raised.value) for part in (str(folder), "mood", "written by 0.9.0"))


def test_with_no_good_checkpoint_left_the_run_is_not_called_new(tmp_path: Path, directory: Path) -> None:
    directory.mkdir()
    assert newest(directory) is None
    write_model(tmp_path, 1)
    (store.step_directory(directory, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies \(.*holds no manifest.json"):
        newest(directory)


def test_steps_are_ordered_by_number_and_leftovers_are_no_checkpoints(
    tmp_path: Path, directory: Path
) -> None:
    for step in (900_000_000, 2_000_000_000, 5):
        write_model(tmp_path, step)
    (directory / ".tmp-step-000000007").mkdir()
    (directory / "step-old").mkdir()
    assert steps_on_disk(directory) == [5, 900_000_000, 2_000_000_000]


def test_only_our_own_names_are_steps(tmp_path: Path) -> None:
    for name in ("step-²", "step-5", "step-000000004-copy", "step-٠٠٠٠٠٠٠٠٣", "step-000000002"):
        (tmp_path / name).mkdir()
    assert steps_on_disk(tmp_path) == [2]


def test_an_export_gives_the_same_model_without_deepspeed(tmp_path: Path) -> None:
    state = write_model(tmp_path / "run", 3)
    for out in ("one.safetensors", "folder"):
        path = export_safetensors(tmp_path / "run", tmp_path / out)
        assert locate(path) == str(path) and SavedModel(path).step == 3
        for source in (
            tmp_path / "run",
            store.step_directory(tmp_path / "run" / "checkpoints", 3),
            tmp_path / out,
        ):
            model = load_model(source)
            assert model.config == CONFIG and not model.training
            assert all(torch.equal(param, state[name]) for name, param in model.named_parameters())
    assert set(load_file(tmp_path / "one.safetensors")) == set(state)
    assert SafetensorsReader(tmp_path / "one.safetensors").metadata["vitscale.step"] == "3"


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint: give a run directory"):
        SavedModel(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"hello, this is text")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SavedModel(tmp_path / "x.safetensors")
    write_safetensors(tmp_path / "y.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="was not exported by vitscale"):
        SavedModel(tmp_path / "y.safetensors")


def test_a_commit_needs_every_file_whole(tmp_path: Path) -> None:
    temporary = write_step(tmp_path / "written", 3, state_of(3))
    manifest = Manifest.load(temporary)
    file = temporary / "rank-00001.safetensors"
    content = file.read_bytes()
    final = store.step_directory(tmp_path / "run", 3)
    final.parent.mkdir()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00001.* is not visible to rank 0"):
        store.commit(manifest, temporary, final)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001.* is not visible to rank 0"):
        store.commit(manifest, temporary, final)
    assert not final.exists()
    file.write_bytes(content)
    store.commit(manifest, temporary, final)
    assert verified(final) == manifest and not temporary.exists()
    assert (final.parent / store.LATEST).read_text() == "step-000000003\n"


@pytest.mark.parametrize(("key", "least"), [("keep_last", 1), ("every_steps", 0), ("keep_every_steps", 0)])
def test_each_count_of_the_config_has_its_least_value(key: str, least: int) -> None:
    assert getattr(CheckpointConfig(**{key: least}), key) == least
    with pytest.raises(ConfigError, match=f"checkpoint.{key}"):
        CheckpointConfig(**{key: least - 1})


def test_a_save_that_fails_for_lack_of_inodes_says_so(tmp_path: Path) -> None:
    """In a mount namespace with a file system of two files: its folder, and another one."""
    small = 'mount -t tmpfs -o nr_inodes=2 tmpfs "$0" && touch "$0/other" && exec "$@"'
    program = (
        "import sys; from pathlib import Path;"
        "from vitscale import command; from vitscale.checkpoint import snapshot;"
        "step = Path(sys.argv[1], 'step');"
        "sys.exit(command.run(lambda: snapshot._saving(step / 'manifest.json', step.mkdir)))"
    )
    within = ["unshare", "--map-root-user", "--mount", "sh", "-c", small, tmp_path]
    ended = subprocess.run([*within, sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "No space left on device (no inode is free there: delete files)" in ended.stderr
