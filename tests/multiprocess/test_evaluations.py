"""Evaluations in training are the same on any number of ranks, and leave the losses alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from multiprocess.collectives import label_pool, overflow
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale import config as configs
from vitscale.evals import KMeansConfig, KnnConfig, LinearConfig, LogisticConfig
from vitscale.evals.classify import ClassifyTask
from vitscale.evaluate import evaluate
from vitscale.job import open_tasks, prepare
from vitscale.metrics.rows import read_metrics
from vitscale.train_config import TrainConfig


def sections(index: Path) -> list[str]:
    """Each kind on 83 images: they are not divided evenly among 2 or 3 ranks."""
    shards = f"test='{index.parent}/train-*.tar', every_steps=100, batch_size=10"
    probe = f"train='{index.parent}/train-*.tar', {shards}"
    return [
        f"evals.near={{kind='knn', k=[3, 9], {probe}}}",
        f"evals.log={{kind='logistic', c=[0.01, 1.0], {probe}}}",
        f"evals.lin={{kind='linear', epochs=4, batch=32, {probe}}}",
        f"evals.few={{kind='fewshot', shots=[1, 3], {probe}}}",
        f"evals.clusters={{kind='kmeans', {shards}}}",
        f"evals.top={{kind='classify', {shards}}}",
    ]


def evaluations(job: Job) -> dict[tuple[int, str], float]:
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    return {(row["step"], name): row[name] for row in rows for name in row if name.startswith("eval/")}


def test_evaluations_are_equal_on_1_2_and_3_ranks_and_leave_the_losses_alone(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    # 12 images a step fit all three worlds; with a rate of 0 all have the same weights
    common = ("global_batch=12", "engine.micro_batch=1", "total_steps=6", "data.lanes=6")
    still = ("optim.lr=1e-30", "optim.weight_decay=0")
    expected: dict[tuple[int, str], float] = {}
    for world_size, stage in ((1, 1), (2, 1), (3, 3)):
        job = Job(tmp_path / str(world_size), index)
        options = (*common, *still, f"engine.zero_stage={stage}", *sections(index))
        assert zygote.train(job, world_size, *options) == [0] * world_size, job.output()
        found = evaluations(job)
        assert {step for step, _ in found} == {0, 6} and len(found) == 2 * 14
        expected = expected or found
        assert found == pytest.approx(expected, abs=1e-9), f"{world_size} ranks"
    # They neither turn dropout off for good nor leave the average in place of the weights.
    common = (*common, "model.dropout=0.1", "optim.ema_decay=0.9")
    with_them, without = Job(tmp_path / "with", index), Job(tmp_path / "without", index)
    assert zygote.train(with_them, 2, *common, *sections(index)) == [0, 0], with_them.output()
    assert zygote.train(without, 2, *common) == [0, 0], without.output()
    assert with_them.column("train/loss") == without.column("train/loss")


def said_by_three(function: Callable[..., None], index: Path, folder: Path, zygote: Zygote) -> list[Any]:
    """What each of three ranks writes into folder/RANK.json."""
    log = folder / "log"
    assert zygote.run(3, function, index, folder, log=log) == [0, 0, 0], log.read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_each_rank_reads_the_chunks_of_its_block_for_the_labels_of_a_few_shot_pool(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """22 chunks of 83 samples, in blocks of 28, 28 and 27; one chunk lies in two blocks."""
    said = said_by_three(label_pool, index, tmp_path, zygote)
    assert [labels for labels, _ in said] == [[sample % 5 for sample in range(83)]] * 3
    assert [num_chunks for _, num_chunks in said] == [7, 8, 8]


def test_a_model_that_overflows_on_an_image_of_one_rank_is_refused_by_all(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    said = said_by_three(overflow, index, tmp_path, zygote)
    told = [[f"the {what} of 1 of 83 images are not finite", True] for what in ("logits", "features")]
    assert said == [told] * 3


@pytest.mark.parametrize(
    ("section", "num_workers"), [("", 3), (", num_workers=0", 0), (", num_workers=1", 1)]
)
def test_they_decode_with_as_many_processes_as_training_unless_they_say(
    tmp_path: Path, index: Path, section: str, num_workers: int
) -> None:
    top = f"evals.top={{test='{index.parent}/train-*.tar'{section}}}"
    config = configs.load(TrainConfig, [Job(tmp_path, index).config], ["engine.num_workers=3", top])
    task = open_tasks(prepare(config, world_size=1))["top"]
    assert isinstance(task, ClassifyTask) and task.test.num_workers == num_workers


def test_by_hand_they_are_those_in_training_and_the_features_are_kept(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    import torch

    job = Job(tmp_path / "run", index)
    assert zygote.train(job, 2, *sections(index)) == [0, 0], job.output()
    sets = {"test": f"{index.parent}/train-*.tar"}
    both = {**sets, "train": sets["test"]}
    configs = {
        "near": KnnConfig(k=(3, 9), batch_size=10, **both),
        "log": LogisticConfig(c=(0.01, 1.0), **both),
        "lin": LinearConfig(epochs=4, batch=32, **both),
        "clusters": KMeansConfig(**sets),
    }
    folder = tmp_path / "features"
    for name, config in configs.items():
        outcome = evaluate(str(job.run_dir), name, config, torch.device("cpu"), cache=str(folder))
        for key, value in outcome["results"].items():
            assert evaluations(job)[20, f"eval/{name}/{key}"] == pytest.approx(value), (name, key)
    assert len(list(folder.iterdir())) == 1  # one set, one model
