"""A head's predictions, written and summed up, of models whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evals.test_tasks import ColourModel, write_shard
from torch import Tensor

from vitscale.data.evalset import EvaluationSet
from vitscale.data.indexing import build_index
from vitscale.data.sources import Source
from vitscale.evals import ClassifyConfig, open_task
from vitscale.evals.classify import ClassifyTask
from vitscale.evals.predictions import Predictions, calibration_error, confusions, summary, write


def open_classify(shards: str, batch_size: int = 3) -> ClassifyTask:
    task = open_task("colours", ClassifyConfig(test=shards, batch_size=batch_size), 4)
    assert isinstance(task, ClassifyTask)
    return task


class Confused(ColourModel):
    """Takes class 2 for class 5, always."""

    def logits(self, images: Tensor) -> Tensor:
        logits = super().logits(images)
        logits[:, 5] = torch.maximum(logits[:, 5], logits[:, 2] + 1)
        return logits


def test_the_results_are_those_of_the_predictions(tmp_path: Path):
    shards = write_shard(tmp_path / "test.tar", [str(i % 7) for i in range(20)] + ["1 4", "2 5"])
    task, model = open_classify(shards), Confused()
    predictions = task.predict(model)
    assert task.run(model) == {"top1": 19 / 22, "top5": 1.0, "num_samples": 22}  # not the 3 of class 2
    assert task.results(predictions.gathered().counts(), model) == task.run(model)
    assert predictions.classes.shape == (22, 5) and predictions.labels.shape == (22, 2)
    assert (predictions.probabilities.diff(dim=1) <= 0).all()


def test_a_line_for_each_image_with_its_key(tmp_path: Path):
    (tmp_path / "classes.json").write_text('["red", "green", "blue", "yellow", "cyan", "magenta", "grey"]')
    shards = write_shard(tmp_path / "test.tar", ["0", "2", "1 4"])
    task = open_classify(shards)
    path = tmp_path / "out" / "predictions.jsonl"
    write(path, task.predict(Confused()), task.test)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in rows] == ["sample00000", "sample00001", "sample00002"]
    assert [row["labels"] for row in rows] == [[0], [2], [1, 4]]
    assert [row["right"] for row in rows] == [True, False, True]
    assert [row["classes"][0] for row in rows] == [0, 5, 1]
    assert all(len(row["classes"]) == 5 and 0.5 < row["probabilities"][0] <= 1 for row in rows)


def test_a_summary_says_which_class_is_taken_for_which(tmp_path: Path):
    (tmp_path / "classes.json").write_text('["red", "green", "blue", "yellow", "cyan", "magenta", "grey"]')
    shards = write_shard(tmp_path / "test.tar", ["0"] * 3 + ["2"] * 4 + ["5"] * 2 + ["2 5"])
    task = open_classify(shards)
    details = summary(task.predict(Confused()), task.test)
    assert details["per_class"] == [
        {"class": 0, "name": "0 (red)", "num_samples": 3, "accuracy": 1.0},
        {"class": 2, "name": "2 (blue)", "num_samples": 5, "accuracy": 0.0},
        {"class": 5, "name": "5 (magenta)", "num_samples": 3, "accuracy": 1.0},
    ]
    assert details["confusions"] == [{"class": "2 (blue)", "taken_for": "5 (magenta)", "count": 4}]


def test_classes_of_a_mapped_split_have_the_names_that_the_data_give_them(tmp_path: Path):
    """The run's classes 0, 1 and 2 are the data's 1, none and 0."""
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    index = build_index([write_shard(tmp_path / "train.tar", ["0", "1"])])
    source = Source(name="0", index=index, label_map={0: 2, 1: 0}, excluded=np.empty(0, dtype=np.int64))
    test = EvaluationSet(index, image_size=4, source=source)
    labels, classes = torch.tensor([[2], [2], [0]]), torch.tensor([[0], [1], [0]])
    details = summary(Predictions(classes, torch.ones(3, 1), labels, torch.zeros(3)), test)
    assert [row["name"] for row in details["per_class"]] == ["0 (from 1 (dog))", "2 (from 0 (cat))"]
    assert [(row["class"], row["taken_for"]) for row in details["confusions"]] == [
        ("2 (from 0 (cat))", "0 (from 1 (dog))"),
        ("2 (from 0 (cat))", "1"),
    ]


def test_confusions_come_with_the_most_frequent_first():
    first = torch.tensor([1, 1, 2, 0, 0, 0, 3])
    labels = torch.tensor([[0], [0], [0], [0], [1], [2], [-1]])
    predictions = Predictions(first[:, None], torch.ones(7, 1), labels, torch.zeros(7)).labelled()
    assert confusions(predictions) == [(0, 1, 2), (0, 2, 1), (1, 0, 1), (2, 0, 1)]


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    right = torch.arange(10) < 7
    assert calibration_error(torch.full((10,), 0.7), right) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.ones(10), right) == pytest.approx(0.3)
    # One bin is too sure by 0.4, the other too modest by 0.2.
    confidences = torch.tensor([0.9, 0.9, *[0.3] * 6])
    right = torch.tensor([True, False, True, True, True, False, False, False])
    assert calibration_error(confidences, right) == pytest.approx(0.25 * 0.4 + 0.75 * 0.2, abs=1e-6)
