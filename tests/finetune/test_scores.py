"""The score of VTAB-1k is the mean over its 19 tasks, and what is not the protocol is said."""

import json
from pathlib import Path

import pytest

from vitscale.finetune.protocols import PROTOCOLS, Setting
from vitscale.finetune.scores import Scores, mean_of
from vitscale.finetune.vtab import write
from vitscale.vtab.published import TABLE_9
from vitscale.vtab.tasks import TASKS

WHOLE = {name: (0.5, 0.6) for name in TASKS}


def test_the_mean_is_over_tasks_as_in_the_paper() -> None:
    means = {model: round(mean_of(row), 2) for model, row in TABLE_9.items()}
    assert means == {"ViT-H/14 JFT": 77.63, "ViT-L/16 JFT": 76.29, "ViT-L/16 I21k": 72.71}
    groups = [round(mean_of(TABLE_9["ViT-H/14 JFT"], g), 2) for g in ("natural", "specialized", "structured")]
    assert groups == [86.69, 87.0, 65.03]


def test_each_group_has_its_size() -> None:
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]


def test_mean_and_deviation_are_over_seeds() -> None:
    accuracies = {**WHOLE, "svhn": (0.7, 0.6)}
    scores = Scores(checkpoint="a", protocol="paper", accuracies=accuracies)
    values = scores.to_json()
    assert values["mean"] == pytest.approx((18 * 0.55 + 0.65) / 19) and values["num_tasks"] == 19
    first, second = (18 * 0.5 + 0.7) / 19, 0.6
    assert values["std"] == pytest.approx(abs(first - second) / 2)
    assert values["tasks"]["svhn"] == {
        "group": "natural",
        "mean": pytest.approx(0.65),
        "std": pytest.approx(0.05),
        "accuracies": [0.7, 0.6],
    }
    assert values["groups"]["specialized"] == pytest.approx(0.55)


def test_the_table_ends_with_the_mean_beside_the_papers() -> None:
    rows = list(Scores(checkpoint="a", protocol="paper", accuracies=WHOLE).rows())
    assert rows[-1] == ("mean of all 19", "55.00 ± 5.00", "77.63", "76.29", "72.71")
    assert len(rows) == 19 + 3 + 1 and rows[7][0] == "mean of natural"


def test_some_tasks_are_compared_with_the_papers_on_the_same() -> None:
    scores = Scores(checkpoint="a", protocol="linear", accuracies={"svhn": (0.5,), "dtd": (0.25,)})
    assert list(scores.rows())[-1] == ("mean of these 2, not of all 19", "37.50", "82.05", "80.85", "77.50")


def test_the_chart_has_the_means_of_figure_2_and_all_tasks() -> None:
    means, tasks = Scores(checkpoint="a", protocol="paper", accuracies=WHOLE).figure().axes
    labels = [text.get_text() for text in means.get_xticklabels()]
    assert labels == ["mean of 19", "mean of natural", "mean of specialized", "mean of structured"]
    heights = [[round(float(bar.get_height()), 2) for bar in bars] for bars in means.containers]
    assert heights[:2] == [[55.0] * 4, [77.63, 86.69, 87.0, 65.03]]
    assert [len(bars) for bars in tasks.containers] == [19] * 4
    (left, right), (low, high) = tasks.get_xlim(), tasks.get_ylim()
    for bar in tasks.patches:
        assert left < bar.get_x() and bar.get_x() + bar.get_width() < right and low <= bar.get_height() < high


def test_every_output_says_what_is_not_the_protocol(tmp_path: Path) -> None:
    scores = Scores(checkpoint="a", protocol="paper", accuracies=WHOLE, deviations=("total_steps=20",))
    write(scores, tmp_path)
    assert "Not the protocol: total_steps=20" in scores.text()
    assert "Not the protocol: total_steps=20" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["not_the_protocol"] == ["total_steps=20"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    plain = Scores(checkpoint="a", protocol="paper", accuracies=WHOLE)
    assert "Not the protocol" not in plain.text() and "Not the protocol" not in plain.markdown()


def test_the_markdown_is_a_table(tmp_path: Path) -> None:
    lines = Scores(checkpoint="runs/a", protocol="paper", accuracies=WHOLE).markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + 23


def test_the_protocols_are_those_of_the_papers() -> None:
    paper, light = PROTOCOLS["paper"], PROTOCOLS["light"]
    assert (paper.image_size, paper.batch, paper.settings) == (384, 512, (Setting(0.01, 2500),))
    assert (paper.decay, paper.clip_norm) == ("cosine", 1.0)
    assert light.image_size == 224 and light.decay == "step"
    assert {tuple(setting) for setting in light.settings} == {
        (0.1, 2500), (0.1, 10_000), (0.01, 2500), (0.01, 10_000)
    }  # fmt: skip
