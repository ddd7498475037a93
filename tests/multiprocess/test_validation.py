"""A run with a validation split: resumed elastically, evaluated in training and by hand."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from make import write_index
from multiprocess.job import Job
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale.errors import ConfigError
from vitscale.evals import ClassifyConfig
from vitscale.evaluate import evaluate
from vitscale.metrics.rows import read_metrics
from vitscale.weights.export import export_safetensors

SPLIT = (
    "data.validation_fraction=0.3",
    "evals.val.split=validation",
    "evals.val.every_steps=7",
    "evals.val.batch_size=5",
    "optim.ema_decay=0.9",  # evaluations take the average
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, index: Path, zygote: Zygote) -> Job:
    """20 steps on the 70% of the samples that do not validate."""
    job = Job(tmp_path_factory.mktemp("trained"), index)
    assert zygote.train(job, 1, *SPLIT) == [0], job.output()
    return job


def evaluations(job: Job) -> list[tuple[int, dict[str, float]]]:
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    names = ("top1", "num_samples", "loss")
    return [
        (row["step"], {name: row[f"eval/val/{name}"] for name in names})
        for row in rows
        if "eval/val/top1" in row
    ]


def test_a_killed_run_trains_on_the_same_rest_and_validates_the_same_on_other_worlds(
    tmp_path: Path, trained: Job, index: Path, zygote: Zygote
) -> None:
    killed = Job(tmp_path / "killed", index)
    assert zygote.train(killed, 2, *SPLIT, "engine.num_workers=2", event=KillAll(batch=8)) == [-9, -9]
    assert zygote.train(killed, 4, *SPLIT, "engine.zero_stage=3") == [0] * 4, killed.output()
    assert killed.column("step") == list(range(1, 21))
    assert killed.column("data/digest") == trained.column("data/digest")
    assert killed.column("train/loss") == pytest.approx(trained.column("train/loss"), abs=2e-5)
    for (step, numbers), (other, expected) in zip(evaluations(killed), evaluations(trained), strict=True):
        assert step == other and numbers == pytest.approx(expected, abs=2e-5)
    assert evaluations(trained)[0][1]["loss"] == pytest.approx(math.log(5), abs=1e-6)  # a head of zeros
    assert [step for step, _ in evaluations(trained)] == [0, 7, 14, 20]


def test_the_result_by_hand_is_that_of_the_training(trained: Job) -> None:
    config, cpu = ClassifyConfig(split="validation"), torch.device("cpu")
    by_hand = evaluate(str(trained.run_dir), "val", config, cpu, slot="ema")
    raw = evaluate(str(trained.run_dir), "val", config, cpu)["results"]
    assert by_hand["step"] == 20 and abs(raw["loss"] - by_hand["results"]["loss"]) > 1e-4
    assert by_hand["results"] == pytest.approx(evaluations(trained)[-1][1], abs=1e-6)
    assert 10 < by_hand["results"]["num_samples"] < 40


def test_another_fraction_is_refused_by_its_key(trained: Job, zygote: Zygote) -> None:
    assert zygote.train(trained, 1, *SPLIT, "data.validation_fraction=0.2", "total_steps=22") == [2]
    assert "data.validation_fraction was 0.3, now 0.2" in trained.mistake()


def test_by_hand_there_is_no_split_of_an_export_or_of_other_data(tmp_path: Path, trained: Job) -> None:
    config = ClassifyConfig(split="validation")
    run = shutil.copytree(trained.run_dir, tmp_path / "run")
    export_safetensors(run, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="is an export, which does not name the data"):
        evaluate(str(tmp_path / "model.safetensors"), "val", config, torch.device("cpu"))


def test_by_hand_a_run_on_all_of_its_data_has_no_split(uninterrupted: Job) -> None:
    with pytest.raises(ConfigError, match=r"trained with data\.validation_fraction = 0, on all of"):
        evaluate(str(uninterrupted.run_dir), "val", ClassifyConfig(split="validation"), torch.device("cpu"))


def test_by_hand_data_that_changed_since_are_refused(tmp_path: Path, zygote: Zygote) -> None:
    job = Job(tmp_path / "job", write_index(tmp_path / "shards", [40, 43]))
    assert zygote.train(job, 1, *SPLIT, "total_steps=6") == [0], job.output()
    write_index(tmp_path / "shards", [40, 44])
    with pytest.raises(ConfigError, match="was trained on other data than its config names now"):
        evaluate(str(job.run_dir), "val", ClassifyConfig(split="validation"), torch.device("cpu"))
