"""The row of ReaL: scored once its labels are packed, on fine-tunings that were done before."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from make import jpeg, write_index, write_step, write_tar

from tools.study import main
from vitscale import config as configs
from vitscale.data.indexing import build_index
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.study.cells import Cell, cells, finetune_folder, write_result
from vitscale.study.config import StudyConfig

MODEL = ViTConfig(variant="mu/4", image_size=8, num_classes=5)
RUN = """
run_dir = "unused"
global_batch = 8
total_steps = 6

[model]
variant = "mu/4"
image_size = 8
num_classes = 5

[data]
index = "{index}"
"""
RECIPE = """
[optim]
ema_decay = 0.9

[evals.val]
kind = "classify"
test = "{index}"

[finetune]
seeds = [0]
"""
REAL = ([1, 2], [0], [], [1], [3, 1, 4])


def write_model(run: Path, average: int, newest: int) -> None:
    """A checkpoint that puts all images in one class, the average of its weights in another."""
    params = {name: param.detach() for name, param in build_model(MODEL, seed=0).named_parameters()}
    tensors = {
        (slot, name): torch.eye(5)[label] if name == "head.bias" else tensor
        for slot, label in (("ema", average), ("fp32", newest))
        for name, tensor in params.items()
    }
    write_step(run, 6, tensors, config={"model": {"kind": "vit", **dataclasses.asdict(MODEL)}})


def finished(study: StudyConfig) -> Cell:
    """The only run of a study, done, and its fine-tuning on ImageNet, scored on `val` alone."""
    (cell,) = cells(study)
    final = finetune_folder(cell, "imagenet") / "final-seed0"
    write_model(Path(cell.config.run_dir), 3, 3)
    write_model(final / "run", average=1, newest=0)
    row = {"step": 6, "eval/val/top1": 0.25}
    (Path(cell.config.run_dir) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_result(cell, study)
    (final / "result.json").write_text(json.dumps({"results": {"top1": 0.5}}))
    return cell


def test_a_finished_study_gets_the_row_of_real_without_another_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, real = write_index(tmp_path / "shards", [10]), tmp_path / "real" / "val.index.json"
    run, recipe, path = (tmp_path / name for name in ("run.toml", "recipe.toml", "study.toml"))
    run.write_text(RUN.format(index=index))
    recipe.write_text(RUN.format(index=index) + RECIPE.format(index=index))
    path.write_text(
        f'out = "{tmp_path}/out"\nmetric = "eval/val/top1"\n[recipes]\nimagenet = "{recipe}"\n'
        f'[[models]]\nname = "one"\nconfig = "{run}"\n'
    )

    def rows(command: str) -> tuple[str, dict[str, list[str]]]:
        assert main([command, str(path)]) == 0
        said = capsys.readouterr().out
        return said, {line.split("  ")[0]: line.split()[-3:] for line in said.splitlines()}

    cell = finished(configs.load(StudyConfig, [path]))
    assert "is not scored" not in rows("run")[0]  # by a recipe of an earlier version
    recipe.write_text(f'{recipe.read_text()}test_sets = {{imagenet_real = "{real}"}}\n')
    assert f"imagenet_real is not scored: {real} is missing; pack it, and" in rows("run")[0]
    before = rows("table2")[1]
    assert before["ImageNet"] == ["50.00", "±", "0.00"] and before["ImageNet ReaL"][-1] == "-"

    real.parent.mkdir()
    samples = [(f"{n}.jpg", jpeg(n)) for n in range(5)] + [
        (f"{n}.json", json.dumps(labels).encode()) for n, labels in enumerate(REAL)
    ]
    build_index([str(write_tar(real.parent / "val-0.tar", sorted(samples)))]).save(real)
    assert "  rate 0.001    imagenet_real 75.00 ± 0.00% (75.00)" in rows("run")[0]
    after = rows("table2")[1]
    assert after.pop("ImageNet ReaL") == ["75.00", "±", "0.00"]  # three of four, by the average
    del before["ImageNet ReaL"]
    assert after == before

    final = finetune_folder(cell, "imagenet") / "final-seed0"
    score = final / "on-imagenet_real" / "result.json"
    assert not (final / "log").exists() and json.loads(score.read_text())["results"]["num_samples"] == 4
    written = score.stat().st_mtime_ns
    real.unlink()  # what was found stays
    assert "imagenet_real 75.00" in rows("run")[0] and score.stat().st_mtime_ns == written
