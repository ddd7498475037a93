"""docs/data.md, "Your own images", word by word: its commands, on a small folder of images."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from make import jpeg

from launch.train import main as train
from tools.data import main as pack
from vitscale import config as configs
from vitscale.metrics.rows import read_metrics
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("cat", "dog", "owl")
# What makes the run of the page small.
SMALL = (
    "model.variant=mu/16 model.image_size=32 total_epochs=2 global_batch=16 engine.num_workers=0 "
    "log.tensorboard=false"
)


def blocks(language: str) -> list[str]:
    """The examples of the section, in the order of the page."""
    section = (ROOT / "docs" / "data.md").read_text().split("## Your own images")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Its commands, with this folder's number of classes in place of the 10 of the page."""
    lines = block.replace("\\\n", " ").replace("model.num_classes=10", f"model.num_classes={len(CLASSES)}")
    return [shlex.split(line, comments=True) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the repository, with photographs in it: a cut one, too, and a note."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for number in range(90):
        path = folder / "photos" / CLASSES[number % 3] / f"IMG {number // 3}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, size=40))
    path.write_bytes(path.read_bytes()[:300])
    (folder / "photos" / "notes.txt").write_text("taken in May")
    (folder / "new.jpg").write_bytes(jpeg(1000, size=50))
    return folder


def run(clone: Path, words: list[str]) -> str:
    """What a command of the page prints; it must end with status 0."""
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *words[1:]], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout}{ended.stderr}"
    return ended.stdout + ended.stderr


def test_the_page_is_followed_from_a_folder_of_photographs_to_an_export(clone: Path) -> None:
    packing, plan, training, evaluation, export = commands(blocks("bash")[0])

    packed = run(clone, packing)
    assert "data/photos/index.json: 89 samples in 1 shards, 3 classes" in packed
    assert "to train on them: model.num_classes = 3" in packed
    assert "notes.txt: neither a split" in packed and "cannot be decoded" in packed and "2 left out" in packed

    planned = run(clone, [*plan, *SMALL.split()])
    train_samples, validation_samples = (
        int(re.search(rf"^  {name} +(\d+) samples of 3 classes$", planned, re.M)[1])  # type: ignore[index]
        for name in ("train", "validate")
    )
    assert train_samples + validation_samples == 89 and 3 <= validation_samples <= 18
    assert not (clone / "runs").exists()

    run(clone, [*training, *SMALL.split()])
    rows = read_metrics(clone / "runs" / "photos" / "metrics.jsonl")
    scores = [row["eval/validation/top1"] for row in rows if "eval/validation/top1" in row]
    assert len(scores) == 2 and json.loads((clone / "runs/photos/status.json").read_text())["state"] == "done"

    config = configs.load(TrainConfig, [clone / "configs" / "starter.toml"])
    assert evaluation[-2:] == ["--crop", config.evals["validation"].crop]  # else it is another number
    evaluated = run(clone, evaluation)
    assert re.search(rf"^  top1 +{scores[-1]:.4f}$", evaluated, re.M), evaluated
    assert re.search(rf"^  num_samples +{validation_samples}$", evaluated, re.M), evaluated
    run(clone, export)

    (predict,) = blocks("python")
    shares = run(clone, ["python", "-c", predict]).splitlines()
    assert sorted(line.split()[1] for line in shares) == list(CLASSES)
    assert sum(float(line.split("%")[0]) for line in shares) == pytest.approx(100, abs=0.2)


def test_the_small_model_of_the_page_would_train(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (small,) = commands(blocks("bash")[1])
    monkeypatch.chdir(clone)
    if not Path("data").exists():
        assert pack(["pack", "photos/", "data/photos"]) == 0
    assert train([*small[2:], "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert 'variant = "Ti/16"' in planned and "total steps             10" in planned


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run"]], ids=["alone", "launched"])
def test_a_rank_that_has_the_machine_uses_the_threads_that_a_user_asks_for(
    tmp_path: Path, launcher: list[str]
) -> None:
    """Where others use the cores too, threads spend their time waiting for one another."""
    (tmp_path / "program.py").write_text(
        "import torch; from vitscale import distributed as d; d.initialize(); print(torch.get_num_threads())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, tmp_path / "program.py"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1" in ended.stdout.splitlines(), ended.stderr  # torch 2.10 prints lines of its own, too
