"""Runs, exports and shards that earlier commits wrote (tests/kept) are read and resumed.

Only command lines and vitscale.load_model are used: modules may move, users' files may not.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess.job import ROOT, Job
from multiprocess.rank_runs import train_in
from multiprocess.ranks import HasFp16
from multiprocess.zygote import Zygote

import vitscale
from tools import checkpoint, data, evaluate

KEPT = ROOT / "tests" / "kept"
FIRST, SECOND = "2f29909", "3cac911"  # the folders, named after their commits
EXPORTS = {
    "safetensors": "exports/model.safetensors",
    "timm": "exports/timm",
    "npz": "exports/model.npz",
}
EXPECTED, EXPECTED_OF_SECOND = (json.loads((KEPT / c / "expected.json").read_text()) for c in (FIRST, SECOND))
LOGITS = {name: EXPECTED[name] | EXPECTED_OF_SECOND[name] for name in ("logits", "last_logits")}
STEPS = EXPECTED["steps"] | EXPECTED_OF_SECOND["steps"]


class KeptJob(Job):
    """A kept run in the working directory, resumed as by somebody who stopped it then."""

    def __init__(self, name: str) -> None:
        self.run_dir, self.config, self.log = Path(name), Path(f"{name}.toml"), Path("log")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the first in a copy of the kept folders: paths are relative."""
    copy = shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(copy / FIRST)
    for name, value in (("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)  # which an evaluation sets, or reads


def folder_of(name: str) -> str:
    """Where a run is, from the first folder."""
    return name if name in EXPECTED["steps"] else f"../{SECOND}/{name}"


# On other processors the losses differ by rounding, in bf16 by much more than in fp32.
@pytest.mark.parametrize(
    ("name", "world_size", "zero_stage", "tolerance"),
    [
        pytest.param("run", 2, 2, 1e-6, id="run, same layout"),
        pytest.param("run", 1, 3, 1e-5, id="run, other layout"),
        pytest.param("bf16", 2, 3, 1e-2, id="bf16 and frozen, same layout"),
        pytest.param("bf16", 1, 1, 1e-2, id="bf16 and frozen, other layout"),
        pytest.param("version1", 1, 2, 1e-5, id="version 1, other layout"),
        pytest.param("adafactor", 2, 3, 1e-6, id="Adafactor, same layout"),
        pytest.param("adafactor", 1, 2, 1e-5, id="Adafactor, other layout"),
        pytest.param("muon", 2, 2, 1e-5, id="Muon, same layout"),
        pytest.param("muon", 1, 1, 1e-5, id="Muon, other layout"),
        pytest.param("fp16", 2, 2, 1e-2, id="fp16, same layout"),
        pytest.param("fp16", 1, 3, 1e-2, id="fp16, other layout"),
    ],
)
def test_a_run_continues_as_it_would_have_then(
    zygote: Zygote, name: str, world_size: int, zero_stage: int, tolerance: float
) -> None:
    os.chdir(f"{folder_of(name)}/..")
    job, expected = KeptJob(name), STEPS[name]
    place, event = Path.cwd(), HasFp16() if name == "fp16" else None
    before = job.rows()
    overrides = (f"total_steps={expected[-1]['step']}", f"engine.zero_stage={zero_stage}")
    ended = zygote.run(world_size, train_in, place, job.config, overrides, event, log=place / job.log)
    assert ended == [0] * world_size, job.output()
    rows = job.rows()
    assert rows[: len(before)] == before
    after = rows[len(before) :]
    for column in ("step", "data/digest"):
        assert [row[column] for row in after] == [row[column] for row in expected]
    for column in ("train/loss", "train/grad_norm"):
        values, expected_values = ([row[column] for row in rows] for rows in (after, expected))
        assert values == pytest.approx(expected_values, rel=tolerance)
    for state, logits in LOGITS["last_logits"][name].items():  # by the restored moments and averages
        torch.testing.assert_close(logits_of(name, state), torch.tensor(logits), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", STEPS)
def test_a_model_gives_the_logits_that_it_gave_then(name: str) -> None:
    for state, logits in LOGITS["logits"][name].items():
        torch.testing.assert_close(logits_of(folder_of(name), state), torch.tensor(logits), rtol=0, atol=1e-6)


def test_an_export_is_loaded_with_the_weights_it_was_made_of() -> None:
    assert weights_of("exports/model.safetensors") == EXPECTED["weights"]


@pytest.mark.parametrize("format", EXPORTS)
def test_an_export_is_imported_with_the_same_weights(format: str) -> None:
    assert checkpoint.main(["import", EXPORTS[format], "imported", "--format", format]) == 0
    assert weights_of("imported") == EXPECTED["weights"]


@pytest.mark.parametrize("format", EXPORTS)
def test_a_run_is_exported_with_the_weights_of_then(format: str) -> None:
    shutil.rmtree("exports")
    assert checkpoint.main(["export", "run", EXPORTS[format], "--format", format]) == 0
    assert checkpoint.main(["import", EXPORTS[format], "imported", "--format", format]) == 0
    assert weights_of("imported") == EXPECTED["weights"]


@pytest.mark.parametrize(("name", "step"), [(name, rows[0]["step"] - 1) for name, rows in STEPS.items()])
def test_a_checkpoint_is_verified_listed_and_shown(
    name: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "list", "show"):
        assert checkpoint.main([command, folder_of(name)]) == 0
        printed = capsys.readouterr().out
        assert f"{name}/checkpoints" in printed and "verified" in printed and str(step) in printed


def test_an_index_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("one", 41), ("two", 11)):
        assert data.main(["verify", f"shards/{name}/index.json", "--decode", "--workers", "0"]) == 0
        assert f"{count} samples" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["classify", "fewshot"])
def test_an_evaluation_gives_what_it_gave_then(kind: str) -> None:
    shards = "shards/one/index.json"
    options = {
        "classify": ["--data", shards],
        "fewshot": ["--train", shards, "--test", shards, "--shots=1,5"],
    }
    assert evaluate.main([kind, "run", "--ema", *options[kind], "--json", "result.json"]) == 0
    results = json.loads(Path("result.json").read_text())["results"]
    # Rounding may change the class of one image of the 41, not of two.
    assert results == pytest.approx(EXPECTED["evaluations"][kind], abs=1.01 / 41)


def logits_of(path: str, state: str) -> torch.Tensor:
    """The logits of a checkpoint or export for the images of expected.json."""
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        return vitscale.load_model(path, slot=state)(torch.from_numpy(images))


def weights_of(path: str) -> dict[str, str]:
    """A SHA-256 of each tensor of an export."""
    state = vitscale.load_model(path).state_dict()
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
