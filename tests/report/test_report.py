"""What all commands on checkpoints have in common: damage, mistakes, JSON for scripts."""

import re
from pathlib import Path

import pytest
import torch
from checkpoint_tool import Capture, call, call_json, export
from make import CONFIG, damage, state_of, write_step


def test_damage_is_refused_and_a_run_falls_back_to_its_newest_good(
    run: Path, capsys: Capture, caplog
) -> None:
    newest = run / "checkpoints" / "step-000000030"
    damage(newest / "rank-00002.safetensors")
    for command in (["show", newest], ["verify", newest], ["diff", newest, run], ["diff", run, newest]):
        status, out, err = call(capsys, *command)
        assert status == 2 and "rank-00002.safetensors is damaged: its checksum" in err and not out
    status, out, err = call(capsys, "verify", run)
    assert status == 2 and out.startswith(f"{run}/checkpoints/step-000000020: 7 tensors")
    assert err.startswith("error: the newest checkpoint, step 30, is damaged, and training would resume from")
    assert "checkpoint passed over" in caplog.text
    assert call(capsys, "show", run)[0] == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["list", "{}/nothing"],
            r"holds no checkpoints: there are no step-\* folders in .*/nothing/checkpoints",
        ),
        (
            ["list", "{}/text"],
            r"text holds no checkpoints: there are no step-\* folders in .*/text/checkpoints",
        ),
        (["list", "{}/run/checkpoints/step-000000010"], "is one checkpoint, but list takes a run directory"),
        (["show", "{}/nothing"], "is not a checkpoint: give a run directory"),
        (["show", "{}"], "is not a checkpoint: give a run directory"),
        (["show", "{}/text"], "is not a checkpoint: give a run directory"),
        (["diff", "{}/run", "{}/absent.safetensors"], "absent.safetensors is missing; give the path"),
        (["verify", "{}/cut.safetensors"], "cut.safetensors ends inside b"),
        (
            ["verify", "{}/run/checkpoints/step-000000010/rank-00000.safetensors"],
            "step-000000010/rank-00000.safetensors is a part of a checkpoint; give its folder",
        ),
    ],
)
def test_wrong_input_is_one_sentence(
    run: Path, tmp_path: Path, capsys: Capture, command: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("hello, this is text")
    cut = export(tmp_path / "cut.safetensors", {"a": torch.ones(3), "b": torch.ones(3)})
    cut.write_bytes(cut.read_bytes()[:-1])
    status, out, err = call(capsys, *(part.format(tmp_path) for part in command))
    assert status == 2 and not out and re.search(message, err) and err.count("\n") == 1


def test_the_keys_of_the_json_stay_what_scripts_read(run: Path, tmp_path: Path, capsys: Capture) -> None:
    listed = call_json(capsys, "list", run)
    assert list(listed) == ["places", "checkpoints", "notes"]
    assert list(listed["checkpoints"][0]) == [
        "path", "step", "latest", "state", "problem", "num_bytes", "facts", "metrics", "loss_step",
    ]  # fmt: skip
    shown = call_json(capsys, "show", run)
    assert list(shown["tensors"][0]) == [
        "name", "shape", "dtype", "num_values", "norm", "mean", "abs_max", "num_non_finite", "fixed",
    ]  # fmt: skip
    other = write_step(tmp_path / "b", 30, state_of(31), config={**CONFIG, "seed": 4})
    compared = call_json(capsys, "diff", run, other)
    assert list(compared) == [
        "a", "b", "equal", "config", "facts", "states", "num_identical", "different", "other_shape",
        "only_in_a", "only_in_b",
    ]  # fmt: skip
    assert list(compared["config"][0]) == ["key", "a", "b", "counts"]
    assert list(compared["different"][0]) == [
        "name", "state", "shape", "num_values", "num_different", "max_abs", "relative",
    ]  # fmt: skip
