"""Which checkpoint a path means: the same to every command, and to all ranks of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from make import damage, state_of, write_step

from vitscale.checkpoint import load
from vitscale.checkpoint.save import Saver
from vitscale.checkpoint.store import CheckpointConfig, Home, step_folder
from vitscale.checkpoint.verify import (
    Checkpoint,
    Verdict,
    alone,
    at_a_glance,
    open_directory,
    open_together,
)
from vitscale.errors import CheckpointError
from vitscale.weights.saved import SavedModel, locate

OPENERS = [open_directory, open_together, lambda path: open_directory(path, at_a_glance)]


@pytest.mark.parametrize("opened", OPENERS)
def test_a_path_means_the_same_checkpoint_however_it_is_opened(
    tmp_path: Path, opened: Callable[[str], Checkpoint]
) -> None:
    """A folder stands in for the store in which the run went on."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    older, newer = write_step(run, 100, state_of(100)), write_step(elsewhere, 200, state_of(200))
    (run / "config.toml").write_text(f'[checkpoint]\nstore = "{elsewhere}"\n')
    for path in (str(run), f"file://{run}"):
        assert opened(path).folder == str(newer)
    for path in (str(older), f"file://{older}"):
        assert opened(path).folder == path and opened(path).manifest.step == 100


@pytest.mark.parametrize("opened", OPENERS)
def test_a_step_directory_that_is_gone_or_unfinished_is_refused_as_that(
    tmp_path: Path, opened: Callable[[str], Checkpoint]
) -> None:
    folder = write_step(tmp_path, 100, state_of(100))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000000100 holds no manifest.json: it is not a finished"):
        opened(str(folder))
    with pytest.raises(CheckpointError, match=r"step-000000200 does not exist; its run may have deleted it"):
        opened(f"{tmp_path}/checkpoints/step-000000200")


@pytest.mark.parametrize("older", [[], [3]])
def test_the_next_one_of_a_live_run_that_deletes_its_checkpoint_meanwhile_is_taken(
    tmp_path: Path, older: list[int]
) -> None:
    folder = [write_step(tmp_path, step, state_of(step)) for step in (*older, 6)][-1]

    def check(path: str) -> Verdict:
        if folder.exists():
            write_step(tmp_path, 9, state_of(9))
            folder.rename(tmp_path / "deleted")
        return alone(path)

    found = open_directory(str(tmp_path), check)
    assert (found.manifest.step, found.passed_over) == (9, (str(folder),))


def test_what_was_located_is_not_verified_again(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 6, state_of(6), config={"model": {"variant": "Ti/4"}})
    place = locate(tmp_path)
    damage(folder / "rank-00002.safetensors")
    assert isinstance(place, Checkpoint) and SavedModel(place).step == 6
    with pytest.raises(CheckpointError, match=r"rank-00002.safetensors is damaged"):
        SavedModel(place.folder)


def test_a_checkpoint_in_either_place_of_a_run_counts_by_itself(tmp_path: Path) -> None:
    """A folder stands in for the store."""
    home, config = Home(tmp_path / "run/checkpoints", str(tmp_path / "store/checkpoints")), CheckpointConfig()
    folder = write_step(tmp_path / "run", 100, state_of(100))
    assert Saver(home, config).newest_healthy() == str(folder)
    write_step(tmp_path / "store", 100, state_of(100))
    damage(folder / "rank-00002.safetensors")  # of three files, here is one rank
    found = load.find(home)
    assert found and found.folder == step_folder(home.store, 100) and found.passed_over == (str(folder),)
    assert Saver(home, config, found.passed_over).newest_healthy() == found.folder


def test_best_and_latest_name_checkpoints_that_exist(tmp_path: Path) -> None:
    """After a roll-back, and without keep_best."""
    home, directory = Home(tmp_path / "checkpoints"), tmp_path / "checkpoints"
    for step in (100, 200, 300):
        write_step(tmp_path, step, state_of(step))

    def best_of(steps: Sequence[int]) -> int | None:
        return next((step for step in (200, 100) if step in steps), None)

    saver = Saver(home, CheckpointConfig(keep_last=3), best_of=best_of)
    saver.retain()
    assert (directory / "best").read_text() == "step-000000200\n"
    saver.delete_beyond(100)
    assert (directory / "best").read_text() == (directory / "latest").read_text() == "step-000000100\n"
    Saver(home, CheckpointConfig(keep_last=3)).retain()
    assert not (directory / "best").exists()
