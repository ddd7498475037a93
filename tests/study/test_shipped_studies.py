"""The studies that are shipped, and the numbers of the paper that they repeat."""

import math
from pathlib import Path

import pytest

from vitscale import config as configs
from vitscale.models.flops import forward_macs, train_flops
from vitscale.study.cells import cells
from vitscale.study.config import StudyConfig
from vitscale.study.paper import AVERAGE5, FIGURE3, TABLE2, TABLE6, TARGETS
from vitscale.study.run import check_recipes
from vitscale.study.text import listed
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "configs" / "study").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_that_is_shipped_lists_its_runs_without_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = configs.load(StudyConfig, [path])
    runs = cells(study)
    swept = math.prod(map(len, study.sweep.values()))
    assert len(runs) == len(study.models) * len(study.fractions) * len(study.seeds) * swept
    assert len({cell.folder for cell in runs}) == len(runs)
    assert f"{len(runs)} runs; to do: " in listed(study, runs)
    for cell in runs:
        check_recipes(study, cell)
        few_shot = [task for task in cell.config.evals.values() if task.kind == "fewshot"]
        assert {task.crop for task in few_shot} <= {"resize_center"}  # as big_vision crops there


def test_the_models_of_table_6_cost_what_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = cells(configs.load(StudyConfig, ["configs/study/table6.toml"]))
    assert [cell.model.paper for cell in runs] == list(TABLE6)
    for cell in runs:
        row = TABLE6[cell.model.paper]
        assert cell.config.total_samples == row.epochs * 303_000_000
        exaflops = train_flops(cell.config.model) * cell.config.total_samples / 1e18
        assert exaflops == pytest.approx(row.exaflops, rel=0.05), cell.model.name


def test_figure_3_has_a_run_for_each_of_the_papers_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = cells(configs.load(StudyConfig, ["configs/study/figure3.toml"]))
    lines = {line: [cell for cell in runs if cell.model.resolved_line == line] for line in FIGURE3}
    for line, group in lines.items():
        sizes = [cell.config.data.all_sources()[0].num_samples for cell in group]
        assert sizes == pytest.approx(list(FIGURE3[line]), rel=1e-3), line
    assert sum(map(len, lines.values())) == len(runs)


def test_the_runs_of_figure_4_see_equally_many_images_and_stop_by_accuracy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    runs = cells(configs.load(StudyConfig, ["configs/study/figure4.toml"]))
    assert {cell.config.total_samples for cell in runs} == {7 * 303_000_000}
    assert {cell.config.checkpoint.keep_best for cell in runs} == {"eval/validation/top1"}


def test_the_curves_of_figure_9_are_among_the_runs_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = cells(configs.load(StudyConfig, ["configs/study/ablation_head.toml"]))
    rates = {(cell.config.model.pool, cell.config.optim.lr) for cell in runs}
    assert {("token", 8e-4), ("mean", 8e-4), ("mean", 3e-4)} <= rates
    assert {cell.config.total_samples for cell in runs} == {7 * 303_000_000}


def test_figure_3_is_fine_tuned_on_all_of_table_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = configs.load(StudyConfig, ["configs/study/figure3.toml"])
    assert {tuple(study.recipes_of(model)) for model in study.models} == {AVERAGE5}


@pytest.mark.parametrize("name", ["figure3", "table2", "table6"])
def test_what_is_fine_tuned_on_imagenet_is_scored_on_real(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = configs.load(StudyConfig, [f"configs/study/{name}.toml"])
    for recipe in {study.recipes_of(model)["imagenet"] for model in study.models}:
        assert list(configs.load(TrainConfig, [recipe]).finetune.test_sets) == ["imagenet_real"]


def test_the_series_of_figure_8_share_their_base_and_have_their_own_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    runs = cells(configs.load(StudyConfig, ["configs/study/ablation_shape.toml"]))
    base = runs[0].model
    assert len(base.series) == 5 and {name for cell in runs for name in cell.model.series} == set(base.series)
    assert [len(cell.model.series) for cell in runs[1:]] == [1] * (len(runs) - 1)
    called = {"width of the MLP": "MLP", "patch size": "patch"}
    for name in base.series:
        own = [cell.model.name for cell in runs[1:] if name in cell.model.series]
        assert all(model.startswith(f"{called.get(name, name)} ") for model in own), own
        macs = [forward_macs(cell.config.model) for cell in runs if name in cell.model.series]
        assert len(macs) == len(set(macs)) >= 3, name


def test_the_runs_of_figure_10_have_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = [cell.config for cell in cells(configs.load(StudyConfig, ["configs/study/figure10.toml"]))]
    assert [run.total_samples // 303_000_000 for run in runs] == [7, 7, 14]
    assert [(run.optim.lr, run.optim.weight_decay) for run in runs] == [
        (2e-4, 0.01),
        (4e-4, 0.1),
        (4e-4, 0.1),
    ]


def test_the_papers_numbers_are_consistent() -> None:
    """Table 5 has the last row of each model of Table 6 again; Table 2 is fine-tuned larger."""
    for name, row in {"ViT-B/32": "ViT-B/32 7", "ViT-B/16": "ViT-B/16 7", "ViT-L/16": "ViT-L/16 14"}.items():
        assert FIGURE3[name][303_000_000] == TABLE6[row].accuracy["imagenet"]
    assert all(set(headline.accuracy) <= set(TARGETS) for headline in TABLE2.values())
    assert sum(row.exaflops for row in TABLE6.values()) == 15_721
